"""`grkan.convert_`: turn a transformer into an equivalent KAT, or into a KAT to train from scratch."""

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from itertools import chain, islice
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import is_fake

from ..errors import GrkanTypeError, GrkanValueError, first_of
from ..nn import GroupRational
from ..nn.kinds import linear_width
from ..nn.modes import evaluating
from ..nn.wrappers import unwrap_to_change
from ..rational import table
from ..rational.arguments import check_choice, check_form, check_module, check_order, check_positive
from . import observe
from .batches import Forward, as_batches, check_forward, no_batches, real_tokens, rejected, run_on
from .calibrate import GroupFit, Histogram, expected, fit_group, largest_divisor
from .compare import KeptBatches, errors_alone, is_same, output_error, some_rows
from .observe import Observation
from .recipe import FunctionRecipe, LayerRecipe, Recipe, apply_recipe, recipe_of
from .report import ConversionReport
from .scratch import gains
from .site import Site
from .structure import choose, find_sites
from .trial import trial_run
from .watch import Watched

# The default of `act_init`.
_ACT_INIT = {"pretrained": ("identity", None), "scratch": ("identity", "swish")}


def convert_(
    model: nn.Module,
    *,
    start: str = "pretrained",
    calibration: Any = None,
    num_groups: int = 8,
    order: tuple[int, int] = (5, 4),
    form: str = "abs_of_sum",
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    act_init: Sequence[Any] | None = None,
    max_error: float = 0.05,
    forward: Forward = None,
) -> ConversionReport:
    """Turn the MLPs of a model into GR-KANs, in place (arXiv 2409.10594, section 4).

    With start="pretrained" the model computes the same as before.

    The activation between two linear layers is replaced by a `GroupRational` fitted to it. The first linear layer
    becomes a `RationalLinear` under the same name, with the identity in front of it. The second linear layer, its name
    and all weights stay. A module with the layout of timm's `Mlp` becomes a `GRKAN`. In any other feed-forward part,
    such as a gated MLP or experts, only the activation is replaced, whatever kind of linear layers surround it. A
    function that `forward` calls, such as F.gelu, becomes a child `act`.

    The model is run once to see what it computes: on the first calibration batch, or on an input made for this run.
    Every elementwise function in this run becomes rational, except for those of convolutional stems, gates such as
    sigmoid and softplus, and those that control a state space or a router. `skipped` lists these exceptions. If the
    model cannot be run, only the activations that its structure reveals are converted. If an activation's channels are
    unknown, one function serves all of them.

    Parameters, buffers, hooks, modes and shared modules stay the same objects, except those of an activation with
    parameters (PReLU). So an optimiser made before still works, but lacks the coefficients. The state dict of the
    original model loads into the converted one, and leaves the coefficients unchanged.

    With start="scratch" any architecture becomes a KAT to train. The functions start as the identity and Swish, and the
    linear layers of the MLPs are drawn anew from N(0, gain / fan_in) without bias, so that each MLP preserves the
    variance of its input. The first one has the gain 1, and the second one alpha = 1 / E[F(z)^2], z standard normal
    (Eq. 20). In a gated MLP gate and up are drawn with the gain 1, so their outputs u and v are independent standard
    normals for a normed input; E[F(u)^2 v^2] = E[F(u)^2], so down has the same alpha. From then on the initialisers of
    timm and transformers skip these layers, and `reset_parameters` redraws them in the same way. All other weights
    stay.

    Args:
        model: any module of timm, transformers, torchvision or PyTorch, or your own. Inside torch.compile or
            DataParallel it is converted under its own names. Apply DDP, FSDP and averages of weights afterwards.
        start: "pretrained" or "scratch".
        calibration: typical inputs of the model, to which the functions are fitted: an iterable of batches, read once,
            or a single Tensor or Mapping. A Mapping is passed as model(**batch), a tuple or list as model(batch[0]), a
            Tensor as model(batch). None: the functions are fitted to inputs predicted from the weights. With
            start="scratch" nothing is fitted; the inputs only show how the model is built.
        num_groups: the maximum number of groups. Each function gets the largest number that divides its channels.
        order, form: the order and form of the functions, as for `grkan.group_rational`. (7, 6) is practically exact.
        include, exclude: fnmatch patterns for the names of MLPs or of their parts: convert only these, or all but
            these. At least one pattern of each has to match a module of the model. An elementwise function is always
            converted, in place, if `include` names it or its module.
        act_init: initial functions (in front of the first linear layer, in place of the activation), each as `init` of
            a `GroupRational`. None in the second place fits the original activation. Default: ("identity", None) for
            pretrained, and ("identity", "swish") from scratch. Any other value changes what a pretrained model
            computes.
        max_error: the largest relative error, in norm, of an MLP's output on the calibration data. An MLP above it is
            not converted, and the report's `skipped` says by how much it is off. Without data, it limits the error of
            the activation's output on inputs predicted from the weights or, where no norm tells their size, on normal
            inputs with any standard deviation from 0.25 to 4. Ignored if the model's output is meant to change.
        forward: called as forward(model, batch) instead of the model.

    Returns:
        A `ConversionReport`.

    Warns:
        UserWarning: the model's output is off by more than max_error, although no MLP's output is when only that MLP
            is converted. The model then amplifies small differences, for example when it selects experts or tokens.

    Raises:
        TypeError, ValueError: an argument has a wrong type or value; the model has no MLP to convert, or has fake
            tensors; the calibration is empty, has a batch that the model does not accept, or leads to values that are
            not finite; the outputs of the model and of an MLP would both be off by more than max_error; or the model is
            in a wrapper that keeps a list of its parameters.
        ImportError: SciPy is missing.
        The model is left unchanged.
    """
    model = unwrap_to_change(check_module("model", model))
    if any(is_fake(p) for p in model.parameters()):
        raise GrkanValueError('model must not be made under FakeTensorMode; convert it on the device "meta" instead')
    check_positive("num_groups", num_groups)
    order, form = check_order(order), check_form(form)
    if order[0] < 1:
        raise GrkanValueError(f"order must be (m, n) with m >= 1, for the identity in front of the MLP; got {order}")
    check_choice("start", start, tuple(_ACT_INIT))
    act_init = _check_act_init(_ACT_INIT[start] if act_init is None else act_init)
    check_forward(forward)
    if not isinstance(max_error, (int, float)) or isinstance(max_error, bool):
        raise GrkanTypeError(f"max_error must be a number; got {max_error!r}")
    if not max_error > 0:
        raise GrkanValueError(f"max_error must be above 0; got {max_error!r}")
    included, excluded = _patterns("include", include), _patterns("exclude", exclude)
    wanted = _Wanted(
        start == "scratch", num_groups, order, form, included, excluded or [], act_init, max_error, forward
    )
    # In inference mode the coefficients could never be trained. Compiled parts run uncompiled: compiling them anew for
    # the modules that watch them takes long, and they would be tried on inputs that do not fit.
    with torch.inference_mode(False), torch.compiler.set_stance("force_eager"), ExitStack() as temporary:
        return _convert(model, calibration, wanted, temporary)


@dataclass(frozen=True)
class _Wanted:
    """The arguments of `convert_`, checked."""

    from_scratch: bool
    num_groups: int
    order: tuple[int, int]
    form: str
    included: list[str] | None
    excluded: list[str]
    act_init: tuple[Any, Any]
    max_error: float
    forward: Forward


@dataclass(frozen=True)
class _Plan:
    """The conversion of one MLP, before it is carried out."""

    site: Site
    entry: LayerRecipe
    layer: dict[str, Any]
    """Its element of `ConversionReport.layers`."""
    fits: list[GroupFit]


_Skipped = list[tuple[str, str]]  # as `ConversionReport.skipped`: (name, reason)


def _convert(model: nn.Module, calibration: Any, wanted: _Wanted, temporary: ExitStack) -> ConversionReport:
    """Convert the model. `temporary` keeps changes that the search for activations needs."""
    batches, trial = _trial(model, calibration, wanted.forward)
    sites, skipped = _find(model, trial, wanted, temporary)
    histograms = [Histogram(largest_divisor(s.width, wanted.num_groups), s.width, s.channel_dim) for s in sites]
    kept = KeptBatches(model, partial(run_on, forward=wanted.forward))
    if calibration is not None:
        _calibrate(kept, sites, histograms, batches)
    names = {id(module): name for name, module in model.named_modules()}
    plans = []
    for site, histogram in zip(sites, histograms, strict=True):
        plan, problems = _plan(site, histogram, calibration is not None, names, wanted)
        plans += [] if plan is None else [plan]
        skipped += problems
    if not plans:
        raise _nothing_to_convert(model, skipped)

    temporary.close()
    recipe = Recipe(tuple(plan.entry for plan in plans))
    undo = apply_recipe(model, recipe)
    try:
        cosine, error = (None, None) if wanted.from_scratch else kept.compare()
    except BaseException:
        undo()
        raise
    if error is not None and error > wanted.max_error and wanted.act_init == _ACT_INIT["pretrained"]:
        undo()
        _check_mlps(kept, plans, error, wanted.max_error)
        apply_recipe(model, recipe)
    whole = recipe_of(model)
    assert whole is not None
    fits = [fit for plan in plans for fit in plan.fits]
    return ConversionReport([plan.layer for plan in plans], skipped, cosine, error, whole.to_dict(), fits)


def _find(
    model: nn.Module, trial: Callable[[], Any] | None, wanted: _Wanted, temporary: ExitStack
) -> tuple[list[Site], _Skipped]:
    """Return the activations to convert, and the others with the reasons."""
    seen, skipped = _observe(model, trial)
    reference = None if seen is None or trial is None else _run(model, trial)[1]
    sites, not_found = find_sites(model, seen, wanted.included or (), temporary)
    skipped = not_found + skipped
    if not sites:
        raise _nothing_to_convert(model, skipped)
    names = {name for name, _ in model.named_modules(remove_duplicate=False)}.union(*(site.modules for site in sites))
    for argument, patterns in (("include", wanted.included), ("exclude", wanted.excluded)):
        if patterns and not any(fnmatchcase(name, pattern) for name in names for pattern in patterns):
            raise GrkanValueError(
                f"{argument} must match the name of a module, such as {sites[0].name!r}; {patterns} matches none"
            )
    sites, left_out = choose(sites, wanted.included, wanted.excluded)
    skipped += left_out
    if sites and seen is not None and trial is not None:
        sites, problems = _replaceable(model, sites, seen, trial, reference)
        skipped += problems
    if not sites:
        raise _nothing_to_convert(model, skipped)
    return sites, skipped


def _trial(model: nn.Module, calibration: Any, forward: Forward) -> tuple[Iterator[Any], Callable[[], Any] | None]:
    """Return the batches, and a function that runs the model once: on the first batch, or on an input made for it."""
    if calibration is None:
        return iter(()), trial_run(model)
    batches = as_batches(calibration)
    first = list(islice(batches, 1))

    def run() -> Any:
        return run_on(model, copy.deepcopy(first[0]), forward)  # the model may change it

    return chain(first, batches), run if first else None


def _observe(model: nn.Module, trial: Callable[[], Any] | None) -> tuple[Observation | None, _Skipped]:
    """Observe a run of the model. Returns None if there is no run or it fails, and an entry for `skipped` if it fails.

    A batch that the model does not accept fails again in the calibration, which raises the error.
    """
    if trial is None:
        return None, []
    try:
        with evaluating(model):
            return observe.observe(model, trial), []
    except Exception as error:
        what = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return None, [("", f"the run could not be observed, so functions that `forward` calls were not found: {what}")]


def _run(model: nn.Module, trial: Callable[[], Any], sites: Sequence[Site] = ()) -> tuple[list[Watched], Any]:
    """Run the model with a module in the place of each activation.

    Returns:
        These modules, and some rows of the output: None if it has none, or the exception if the run fails.
    """
    with evaluating(model), observe.all_parts_run(), ExitStack() as stack:
        # Of a module that becomes a GRKAN, no forward is left that could do anything else.
        watched = [stack.enter_context(Watched(site, keeps_input=site.layout != "grkan")) for site in sites]
        try:
            return watched, some_rows(trial())
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # the model may ask the activation for anything
            return watched, error


def _replaceable(
    model: nn.Module, sites: list[Site], seen: Observation, trial: Callable[[], Any], reference: Any
) -> tuple[list[Site], _Skipped]:
    """Return the sites at which a module can take the place of the activation, and a (name, reason) for the others.

    A model may use more of an activation than its output: its class, or its effect on its input. And it may call a
    function that it stored before. So a module that calls the activation is put there for a run, which must not change.
    """
    run = partial(_run, model, trial)

    def changes(output: Any, before: Any = reference) -> bool:
        if isinstance(before, Exception):  # it fails by itself
            return False
        return isinstance(output, Exception) or not is_same(before, output)

    def wrong_ones(tried: Sequence[Site]) -> list[Site]:
        if not tried or not changes(run(tried)[1]):
            return []
        half = len(tried) // 2
        return [*tried] if half == 0 else [*wrong_ones(tried[:half]), *wrong_ones(tried[half:])]

    wrong: list[Site] = []
    watched, after = run(sites)
    if changes(after):
        unchanged = run()[1]
        if changes(unchanged, run()[1]):
            pass  # the model gives something else each time
        elif changes(unchanged):
            wrong = [site for site in sites if site.call is not None]
        else:
            wrong = wrong_ones(sites)
    problems = [
        (site, "the model computes something else, or fails, when another module takes its place") for site in wrong
    ]
    if wrong:
        sites = [site for site in sites if not any(site is other for other in wrong)]
        watched = run(sites)[0]
    _settle(sites, watched)
    found = []
    for site, watch in zip(sites, watched, strict=True):
        if watch.calls or site.parent not in seen.called:
            found.append(site)
        else:
            problems.append((site, "its module runs, but does not call a module that takes its place"))
    return found, [(site.parts["act"] or site.name, f"{site.activation.name}: {why}") for site, why in problems]


def _check_act_init(value: Any) -> tuple[Any, Any]:
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != 2 or value[0] is None:
        raise GrkanValueError(
            "act_init must be a pair: the initial function in front of the first linear layer, and the one in place of "
            f"the activation, where None fits the activation; got {value!r}"
        )
    for init in value:
        if isinstance(init, str):
            table.canonical_name(init, "act_init")
    return value[0], value[1]


def _patterns(name: str, value: str | Sequence[str] | None) -> list[str] | None:
    if value is None:
        return None
    patterns = [value] if isinstance(value, str) else value
    if not isinstance(patterns, Sequence) or not all(isinstance(pattern, str) for pattern in patterns):
        raise GrkanTypeError(f"{name} must be a pattern such as 'blocks.*', or a list of patterns; got {value!r}")
    return list(patterns)


def _nothing_to_convert(model: nn.Module, skipped: _Skipped) -> GrkanValueError:
    reasons = [f"{name or 'itself'}: {reason}" for name, reason in skipped[:3]]
    if any(isinstance(module, GroupRational) for module in model.modules()):
        reasons.append("its other functions are already rational")
    elif not skipped:
        reasons.append("no activation between two linear layers")
    more = f", and {len(skipped) - 3} more" if len(skipped) > 3 else ""
    kind = type(model).__name__
    return GrkanValueError(f"model must have an MLP to convert; {kind} has none: {'; '.join(reasons)}{more}")


def _too_far(layer: dict[str, Any], max_error: float) -> str:
    """Explain why an MLP is skipped: its output would be off."""
    off = f"its output would be off by {layer['output_error']:.2g}, above max_error={max_error:g}"
    found = f"{layer['activation']}: {off}"
    if layer["best_relative_error"] is None:
        return f"{found}; calibration data would give a better estimate"
    best = f"the best known function of order {tuple(layer['order'])}"
    return f"{found}; {best} is off by {layer['best_relative_error']:.2g} on these inputs"


def _check_mlps(kept: KeptBatches, plans: list[_Plan], error: float, max_error: float) -> None:
    """Check the MLPs of a model that is off by more than max_error: raise if an MLP alone is off too, else warn."""
    sites = [plan.site for plan in plans]
    alone = errors_alone(kept.model, sites, [plan.entry for plan in plans], kept.kept[0][1], kept.run)
    wrong = [f"{site.name or '(model)'}: {e:.2g}" for site, e in zip(sites, alone, strict=True) if not e <= max_error]
    if wrong:
        raise GrkanValueError(
            f"model must stay within max_error={max_error:g}; its output would be off by {error:.2g}, and the outputs "
            f"of these MLPs, each converted alone, by: {first_of(wrong)}; exclude them or raise the order"
        )
    warnings.warn(
        f"the converted model's output is off by {error:.2g}, above max_error={max_error:g}, although each "
        "MLP converted alone stays within it: the model amplifies small differences, for example when it selects "
        "experts or tokens",
        stacklevel=4,
    )


def _calibrate(kept: KeptBatches, sites: list[Site], histograms: list[Histogram], batches: Iterator[Any]) -> None:
    """Fill the histograms, keep some batches, and correct the layouts that the structure suggested."""
    number = -1
    with evaluating(kept.model), ExitStack() as stack:
        watched = [stack.enter_context(Watched(s, h.add)) for s, h in zip(sites, histograms, strict=True)]
        for number, batch in enumerate(batches):
            real = real_tokens(batch)
            for histogram in histograms:
                histogram.real = real
            try:
                kept.feed(number, batch)
            except Exception as error:
                raise rejected(number, error) from error
            for site, histogram in zip(sites, histograms, strict=True):
                if histogram.problem.endswith("not finite"):
                    raise GrkanValueError(
                        f"calibration must lead to finite values; in batch {number}, the input of "
                        f"{site.parts['act']} is not finite"
                    )
            for watch in watched:
                if watch.calls:  # one batch is enough
                    watch.stop_watching()
    if number < 0:
        raise no_batches()
    if not any(histogram.samples for histogram in histograms) and not any(h.problem for h in histograms):
        raise GrkanValueError("calibration must reach an MLP; no batch reaches any of the activations")
    for histogram, site, watch in zip(histograms, sites, watched, strict=True):
        if watch.agrees:
            histogram.second = site.second
    _settle(sites, watched)


def _settle(sites: list[Site], watched: list[Watched]) -> None:
    """Correct the layouts that the structure suggested by what was seen in a run."""
    for site, watch in zip(sites, watched, strict=True):
        if site.layout == "linear" and watch.calls and watch.agrees is not True:
            site.keep_linear()


def _plan(
    site: Site, histogram: Histogram, calibrated: bool, names: dict[int, str], wanted: _Wanted
) -> tuple[_Plan | None, _Skipped]:
    """Return how to convert an MLP, or None; and what is not done, with the reason."""
    reason = histogram.problem or ("no calibration batch reaches it" if calibrated and not histogram.samples else "")
    if not reason and site.layout == "activation" and site.doubt:
        reason = site.doubt
    if not reason and not site.activation.alike(histogram.groups):
        reason = "its channels have different functions; a larger num_groups gives each its own"
    if reason:
        return None, [(site.parts["act"] or site.name, f"{site.activation.name}: {reason}")]
    first, second, fits = _functions(site, histogram, wanted)
    layer = _describe(site, histogram, second, fits)
    if fits and not layer["output_error"] <= wanted.max_error:
        return None, [(site.name, _too_far(layer, wanted.max_error))]
    drawn = gains(site, first, second) if wanted.from_scratch else []
    kept_weights = "its weights are not redrawn, because it is unclear which linear layers belong to it"
    problems = [(site.name, kept_weights)] if wanted.from_scratch and not drawn else []
    named = {f"{names[id(module)]}.{weight}".strip("."): gain for module, weight, gain in drawn}
    linear = None if first is None else site.parts["fc1"]
    entry = LayerRecipe(site.name, site.layout, linear, site.parts["act"] or "", first, second, named, site.call)
    return _Plan(site, entry, layer, fits), problems


def _fit_site(site: Site, histogram: Histogram, order: tuple[int, int], form: str) -> list[GroupFit]:
    predicted = histogram if histogram.samples else expected(site, histogram.groups)
    counts, histogram.guessed = predicted.counts, predicted.guessed
    # A group without any scalars uses the sum over all groups.
    rows = [row if row.any() else counts.sum(axis=0) for row in counts]
    name = site.name
    same: dict[bytes, GroupFit] = {}
    found = []
    for group, row in enumerate(rows):
        key = row.tobytes()
        activation = site.activation.of_group(group, histogram.groups)
        if activation is not site.activation:
            key += bytes(str(group), "ascii")
        if key not in same:
            same[key] = fit_group(name, group, activation, row, order, form)
        found.append(GroupFit(**{**vars(same[key]), "group": group}))
    return found


def _functions(
    site: Site, histogram: Histogram, wanted: _Wanted
) -> tuple[FunctionRecipe | None, FunctionRecipe, list[GroupFit]]:
    """Return the functions in front of the first linear layer and in place of the activation, and the latter's fits."""
    order, form = wanted.order, wanted.form
    first = None
    if site.layout != "activation":
        inputs = (linear_width(site.first) or (0, 0))[0]
        groups = largest_divisor(inputs, wanted.num_groups)
        first = _function(wanted.act_init[0], inputs, groups, order, form, site.channel_dim)
    activation, init, width = site.activation, wanted.act_init[1], None if site.shared else site.width
    if init is not None or wanted.from_scratch:
        if init is None:  # without data to weight a fit: take the table's function, if there is one
            init = activation.name if activation.name in table.NAMES else activation.function
        return first, _function(init, width, histogram.groups, order, form, site.channel_dim), []
    fits = _fit_site(site, histogram, order, form)
    numerator, denominator = [f.fit.numerator.tolist() for f in fits], [f.fit.denominator.tolist() for f in fits]
    name, channel_dim = activation.name, site.channel_dim
    second = FunctionRecipe(name, width, len(fits), numerator, denominator, list(order), form, channel_dim)
    return first, second, fits


def _function(
    init: Any, width: int | None, groups: int, order: tuple[int, int], form: str, channel_dim: int
) -> FunctionRecipe:
    rational = GroupRational(groups, init, order, form)
    numerator, denominator = (rows.tolist() for rows in rational.initial_coefficients())
    if all(row == numerator[0] for row in numerator) and all(row == denominator[0] for row in denominator):
        numerator, denominator = numerator[0], denominator[0]
    return FunctionRecipe(rational.init_name, width, groups, numerator, denominator, list(order), form, channel_dim)


def _describe(site: Site, histogram: Histogram, function: FunctionRecipe, fits: list[GroupFit]) -> dict[str, Any]:
    """Return an element of `ConversionReport.layers`."""
    described = {
        "name": site.name,
        "modules": site.modules,
        "layout": site.layout,
        "activation": site.activation.name,
        "order": list(function.order),
        "form": function.form,
        "groups": function.num_groups,
        "samples": histogram.samples,
    }
    if not fits:
        errors = ["interval", "max_error", "rms_error", "cosine", "relative_error"]
        return {**described, **dict.fromkeys([*errors, "best_rms_error", "best_relative_error", "output_error"])}
    shares = histogram.counts.sum(axis=1)
    shares = shares / shares.sum() if histogram.samples else [1 / len(fits)] * len(fits)
    sums = [f.sums for f in fits]
    best = sum(s * f.best_square for s, f in zip(shares, fits, strict=True))
    error, size, product = (sum(s * v[i] for s, v in zip(shares, sums, strict=True)) for i in range(3))
    power = sum(s * float((f.weights * f.fit(f.x) ** 2).sum()) for s, f in zip(shares, fits, strict=True))
    norms = math.sqrt(size) * math.sqrt(power)
    relative = math.sqrt(error / size if size else error)
    calibrated = histogram.samples > 0
    expected_error = max(f.worst_error for f in fits) if histogram.guessed else relative
    return {
        **described,
        "interval": [min(f.fit.interval[0] for f in fits), max(f.fit.interval[1] for f in fits)],
        "max_error": max(f.fit.max_error for f in fits),
        "rms_error": math.sqrt(error),
        "best_rms_error": math.sqrt(best) if calibrated else None,
        "best_relative_error": math.sqrt(best / size if size else best) if calibrated else None,
        "output_error": output_error(site, histogram, fits) if calibrated else expected_error,
        "cosine": (product / norms if norms else 1.0) if calibrated else None,
        "relative_error": relative if calibrated else None,
    }
