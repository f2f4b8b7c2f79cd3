"""GroupRational."""

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from grkan.nn import GroupRational, rational
from grkan.rational import table
from grkan.rational.fit import fit
from grkan.rational.op import group_rational


def test_forward_is_group_rational():
    module = GroupRational(4, "gelu", form="sum_of_abs", channel_dim=1)
    x = torch.randn(2, 8, 3, 3)
    expected = group_rational(x, *module.coefficients(), form="sum_of_abs", channel_dim=1)
    torch.testing.assert_close(module(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("form", ["abs_of_sum", "sum_of_abs"])
@pytest.mark.parametrize("order", [(5, 4), (7, 6)])
@pytest.mark.parametrize("share", [False, True])
def test_a_name_gives_the_coefficients_of_the_table(form, order, share):
    module = GroupRational(3, "tanh", order, form, share)
    numerator, denominator = table.coefficients("tanh", order, form)
    rows = 1 if share else 3
    assert module.numerator.shape == (rows * (order[0] + 1),)
    assert module.denominator.shape == (3 * order[1],)
    a, b = module.coefficients()
    torch.testing.assert_close(a, torch.tensor(numerator).expand(rows, -1))
    torch.testing.assert_close(b, torch.tensor(denominator).expand(3, -1))


def test_coefficients_are_views_of_vectors_row_after_row():
    module = GroupRational(2, ([[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]], [[6.0], [7.0]]), (2, 1))
    assert module.numerator.tolist() == [0, 1, 2, 3, 4, 5]
    assert module.denominator.tolist() == [6, 7]
    numerator, denominator = module.coefficients()
    assert numerator.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert denominator.tolist() == [[6], [7]]
    (numerator[1].sum() * denominator[0, 0]).backward()
    assert module.numerator.grad.tolist() == [0, 0, 0, 6, 6, 6]
    assert module.denominator.grad.tolist() == [12, 0]


@pytest.mark.parametrize("share", [False, True])
def test_a_polynomial_has_no_denominator(share):
    module = GroupRational(4, ([1.0, 0.0, 2.0], []), (2, 0), share_numerator=share)
    assert module.denominator.shape == (0,)
    assert module.coefficients()[1].shape == (4, 0)
    x = torch.randn(3, 8)
    torch.testing.assert_close(module(x), 1 + 2 * x * x)
    assert module.to_function(3)(2.0) == 9.0
    module.load_state_dict(module.state_dict())
    module.reset_parameters()


@pytest.mark.parametrize("order", [(1, 0), (1, 3), (5, 4), (9, 2)])
def test_the_identity_is_exact_for_every_order(order):
    x = torch.randn(5, 8) * 100
    assert torch.equal(GroupRational(2, "identity", order)(x), x)


@pytest.mark.parametrize("init", ["gelu", np.tanh, nn.GELU()], ids=["name", "callable", "module"])
def test_other_orders_and_callables_are_fitted(init):
    module = GroupRational(2, init, (4, 4))
    expected = fit(init, (4, 4))
    torch.testing.assert_close(
        module.coefficients()[0][1].double(), torch.tensor(expected.numerator), rtol=1e-6, atol=1e-7
    )


def test_coefficients_as_init():
    fitted = fit("gelu", (3, 2), interval=(-3, 3))
    module = GroupRational(4, fitted, (3, 2))
    np.testing.assert_allclose(module.to_function(2)(np.linspace(-3, 3)), fitted(np.linspace(-3, 3)), atol=1e-6)
    rows = GroupRational(2, (torch.tensor([[0.0, 1.0], [0.0, 2.0]]), [0.5]), (1, 1))
    assert [c.tolist() for c in rows.coefficients()] == [[[0, 1], [0, 2]], [[0.5], [0.5]]]
    again = GroupRational(2, rows, (1, 1))
    assert torch.equal(again.numerator, rows.numerator)


@pytest.mark.parametrize("change", [nn.Module.half, nn.Module.bfloat16, lambda m: m.to(torch.bfloat16)])
def test_coefficients_stay_float32(change):
    module = change(nn.Sequential(nn.Linear(8, 8), GroupRational(4)))
    assert module[0].weight.itemsize == 2
    assert module[1].numerator.dtype == module[1].denominator.dtype == torch.float32
    assert module(torch.randn(2, 8, dtype=module[0].weight.dtype)).itemsize == 2


def test_dtypes():
    assert GroupRational(4, dtype=torch.bfloat16).numerator.dtype == torch.float32
    assert GroupRational(4, dtype=torch.float64).numerator.dtype == torch.float64
    module = GroupRational(4, dtype=torch.float64)
    assert module.half().numerator.dtype == torch.float64
    assert module.float().numerator.dtype == torch.float32
    assert module.double().numerator.dtype == torch.float64
    previous = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        assert GroupRational(4).numerator.dtype == torch.float32
        torch.set_default_dtype(torch.float64)
        assert GroupRational(4).numerator.dtype == torch.float64
    finally:
        torch.set_default_dtype(previous)


def test_parameters_and_gradients_keep_their_identity_when_cast():
    module = GroupRational(2)
    before = module.numerator
    module(torch.randn(3, 4)).sum().backward()
    module.half()
    assert module.numerator is before
    assert module.numerator.grad.dtype == torch.float32


def test_meta_device():
    with torch.device("meta"):
        module = GroupRational(4, "gelu")
    assert module.numerator.is_meta
    assert module.to(torch.bfloat16).numerator.dtype == torch.float32
    module.to_empty(device="cpu").reset_parameters()
    assert torch.equal(module.numerator, GroupRational(4, "gelu").numerator)


@pytest.mark.parametrize("reset", ["reset_parameters", "init_weights"])
def test_reset_parameters_and_initial_coefficients(reset):
    module = GroupRational(2, "gelu", share_numerator=True)
    start = copy.deepcopy(module.state_dict())
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    numerator, denominator = module.initial_coefficients()
    torch.testing.assert_close(numerator.float().flatten(), start["numerator"], rtol=0, atol=0)
    torch.testing.assert_close(denominator.float().flatten(), start["denominator"], rtol=0, atol=0)
    getattr(module, reset)()
    assert all(torch.equal(value, start[name]) for name, value in module.state_dict().items())


def test_state_dict_copy_and_pickle():
    module = GroupRational(2, lambda x: np.sin(x), (3, 2))
    nn.init.normal_(module.numerator)
    other = GroupRational(2, "identity", (3, 2))
    other.load_state_dict(module.state_dict())
    x = torch.randn(3, 4)
    for twin in (other, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(x), module(x))


@pytest.mark.parametrize("share", [False, True])
def test_to_function(share):
    module = GroupRational(2, "gelu", share_numerator=share)
    with torch.no_grad():
        module.coefficients()[1][1] *= 2
    x = np.linspace(-4, 4, 12).reshape(3, 4)
    for group in range(2):
        function = module.to_function(group)
        numerator, denominator = (c.double() for c in module.coefficients())
        numerator = numerator[0 if share else group][None]
        y = group_rational(torch.tensor(x), numerator, denominator[group][None])
        np.testing.assert_allclose(function(x), y.detach().numpy(), rtol=1e-12)  # the kernel rounds otherwise
        assert function(x).dtype == np.float64
        assert isinstance(function(0.5), float)
        assert function(float(x[1, 2])) == pytest.approx(y[1, 2].item(), rel=1e-12)
    before = function(1.0)
    with torch.no_grad():
        module.numerator.zero_()
    assert function(1.0) == before  # the function as it was, not a view of it


def test_repr():
    assert repr(GroupRational(4)) == "GroupRational(num_groups=4, order=(5, 4), init=swish, form=abs_of_sum)"
    text = repr(GroupRational(4, np.tanh, (3, 2), "sum_of_abs", True, 1))
    assert "init=tanh, form=sum_of_abs, share_numerator=True, channel_dim=1" in text


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"num_groups": 0}, ValueError, "num_groups must be at least 1; got 0"),
        ({"num_groups": 2.0}, TypeError, "num_groups must be an int; got 2.0"),
        ({"order": (5,)}, ValueError, r"order must be a pair \(m, n\).*got \(5,\)"),
        ({"order": (5, -1)}, ValueError, "order must be a pair"),
        ({"order": 5}, TypeError, "order must be a pair"),
        ({"order": (5.0, 4)}, TypeError, "order must be a pair"),
        ({"form": 3}, TypeError, "form must be 'abs_of_sum' or 'sum_of_abs'; got 3"),
        ({"share_numerator": "a"}, TypeError, "share_numerator must be a bool; got 'a'"),
        ({"form": "B"}, ValueError, "form must be 'abs_of_sum' or 'sum_of_abs'; got 'B'"),
        ({"channel_dim": "1"}, TypeError, "channel_dim must be an int; got '1'"),
        ({"dtype": torch.int32}, TypeError, "dtype must be a floating dtype; got torch.int32"),
        ({"init": "swich"}, ValueError, "^init must be one of .*'swish'"),
        ({"init": nn.GELU}, TypeError, "^init must be a function that can be fitted: .* got GELU"),
        ({"init": lambda x: x[:2]}, ValueError, "^init must be a function that can be fitted: .* shape"),
        ({"init": 3}, TypeError, "init must be a name, a callable, a RationalFit or"),
        ({"init": ([0.0, 1.0], [0.0])}, ValueError, r"numerator of init must have shape \(6,\) or \(8, 6\)"),
        ({"init": (torch.ones(8, 6), torch.ones(3, 4))}, ValueError, r"denominator of init .* got \(3, 4\)"),
        ({"init": ([np.nan] * 6, [0.0] * 4)}, ValueError, "numerator of init must be finite"),
        ({"init": ("ab", "cd")}, TypeError, "numerator of init must be numbers"),
        ({"init": (torch.ones(8, 6), [0.0] * 4), "share_numerator": True}, ValueError, r"\(6,\) or \(1, 6\)"),
    ],
)
def test_errors(arguments, error, match):
    with pytest.raises(error, match=match):
        GroupRational(**arguments)


def test_a_fit_of_another_form_or_order():
    fitted = fit("gelu", (3, 2), form="sum_of_abs", interval=(-3, 3))
    with pytest.raises(ValueError, match="init must have the form of the module, 'abs_of_sum'"):
        GroupRational(2, fitted, (3, 2))
    with pytest.raises(ValueError, match="numerator of init"):
        GroupRational(2, fitted, (5, 4), "sum_of_abs")


def test_to_function_of_a_missing_group():
    for group in (4, -1):
        with pytest.raises(ValueError, match=rf"group must lie in \[0, 3\]; got {group}"):
            GroupRational(4).to_function(group)
    for wrong in (1.5, "a", True):
        with pytest.raises(TypeError, match=f"group must be an int; got {wrong!r}"):
            GroupRational(4).to_function(wrong)


class TestStateDict:
    """Form, groups and order are part of it."""

    OTHERS = (
        GroupRational(2, "identity", (5, 4), "sum_of_abs"),
        GroupRational(4, ([0.0, 1.0, 0.0], [0.0, 0.0]), (2, 2)),  # as many numbers
        GroupRational(2, "identity", (7, 6)),
    )

    @pytest.mark.parametrize("other", OTHERS, ids=["form", "groups", "order"])
    @pytest.mark.parametrize("strict", [True, False])
    def test_another_function_is_refused_and_nothing_is_loaded(self, other, strict):
        module = nn.Sequential(GroupRational(2))
        before = copy.deepcopy(module.state_dict())
        match = (
            r"0.numerator: the coefficients are for form .*; the model has form abs_of_sum, groups 2, order \(5, 4\)"
        )
        with pytest.raises(RuntimeError, match=match):
            module.load_state_dict(nn.Sequential(other).state_dict(), strict=strict)
        assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())
        with pytest.raises(ValueError, match="the coefficients are for form"):
            module[0].set_extra_state(other.get_extra_state())

    def test_the_same_numbers_in_other_groups_are_refused(self):
        wide, narrow = GroupRational(2, order=(3, 2)), GroupRational(1, order=(7, 4))
        assert wide.numerator.shape == narrow.numerator.shape
        assert wide.denominator.shape == narrow.denominator.shape
        with pytest.raises(RuntimeError, match=r"groups 1, order \(7, 4\); the model has form abs_of_sum, groups 2"):
            wide.load_state_dict(narrow.state_dict())

    def test_it_is_one_small_tensor_of_its_own(self):
        state = nn.Sequential(GroupRational(2), GroupRational(2)).state_dict()
        first, second = state["0._extra_state"], state["1._extra_state"]
        assert (first.dtype, first.dim()) == (torch.int32, 1)
        assert first.data_ptr() != second.data_ptr()
        assert bytes(first.tolist()).decode().rstrip() == "form abs_of_sum, groups 2, order (5, 4)"
        assert first.shape == GroupRational(1000, "identity", (19, 18), "sum_of_abs").get_extra_state().shape
        assert GroupRational(2, device="meta").get_extra_state().is_meta

    def test_after_to_empty(self):
        module = GroupRational(2, device="meta").to_empty(device="cpu")
        module.load_state_dict(GroupRational(2, "gelu").state_dict())
        assert torch.equal(module.numerator, GroupRational(2, "gelu").numerator)

    @pytest.mark.parametrize("state", [{"form": "abs_of_sum"}, torch.tensor([300]), torch.tensor([255, 254]), None])
    def test_what_grkan_did_not_write_is_refused(self, state):
        module = GroupRational(2)
        with pytest.raises(RuntimeError, match="must be an integer tensor of grkan's"):
            module.load_state_dict({**module.state_dict(), "_extra_state": state})

    def test_what_is_missing(self):
        module = nn.Sequential(GroupRational(2))
        # A model from before its conversion has none of it.
        missing, unexpected = module.load_state_dict({}, strict=False)
        assert (missing, unexpected) == (["0.numerator", "0.denominator"], [])
        state = module.state_dict()
        del state["0._extra_state"]
        assert module.load_state_dict(state, strict=False).missing_keys == ["0._extra_state"]
        with pytest.raises(RuntimeError, match=r"Missing key.*0\._extra_state"):
            module.load_state_dict(state)

    def test_safetensors(self, tmp_path):
        safetensors = pytest.importorskip("safetensors.torch")
        module = nn.Sequential(GroupRational(2, "gelu"), GroupRational(2, "gelu"))
        safetensors.save_model(module, str(tmp_path / "m.safetensors"))
        twin = nn.Sequential(GroupRational(2), GroupRational(2))
        assert safetensors.load_model(twin, str(tmp_path / "m.safetensors")) == (set(), [])
        assert torch.equal(twin[1].numerator, module[1].numerator)
        with pytest.raises(RuntimeError, match="the coefficients are for form"):
            safetensors.load_model(
                nn.Sequential(GroupRational(2, form="sum_of_abs"), GroupRational(2)), str(tmp_path / "m.safetensors")
            )

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_whoever_casts_all_of_it(self, dtype):
        state = {name: t.to(dtype) for name, t in GroupRational(2, "gelu").state_dict().items()}
        module = GroupRational(2)
        module.load_state_dict(state)
        torch.testing.assert_close(module.numerator, GroupRational(2, "gelu").numerator, rtol=0.01, atol=0.01)
        with pytest.raises(RuntimeError, match="the model has form sum_of_abs"):
            GroupRational(2, form="sum_of_abs").load_state_dict(state)

    def test_averages_and_ensembles(self):
        utils = pytest.importorskip("timm").utils
        module = nn.Sequential(GroupRational(2, "gelu"))
        average = utils.ModelEmaV3(module, decay=0.5)
        module[0].numerator.data += 1
        average.update(module)
        average.update(module)
        assert torch.allclose(average.module[0].numerator, module[0].numerator - 0.25)
        stacked, _ = torch.func.stack_module_state([module, copy.deepcopy(module)])
        base = copy.deepcopy(module).to("meta")
        x = torch.randn(3, 4)
        y = torch.vmap(lambda p: torch.func.functional_call(base, p, (x,)))(stacked)
        torch.testing.assert_close(y[1], module(x))

    def test_the_released_names(self):
        numerator, denominator = torch.randn(1, 6), torch.randn(2, 4)
        released = {"weight_numerator": numerator, "weight_denominator": denominator}
        for share in (False, True):
            module = GroupRational(2, form="sum_of_abs", share_numerator=share)
            module.load_state_dict(released)
            a, b = module.coefficients()
            assert torch.equal(a, numerator.expand_as(a))
            assert torch.equal(b, denominator)
        with pytest.raises(RuntimeError, match=r"weight_denominator has shape \(2, 4\) instead of \(4, 2\)"):
            GroupRational(4, "identity", (5, 2), "sum_of_abs").load_state_dict(released)
        with pytest.raises(RuntimeError, match="weight_numerator is for the form 'sum_of_abs'; the model has 'abs_of_"):
            GroupRational(2).load_state_dict(released)

    def test_narrow_numbers_become_wide(self):
        state = {k: v.bfloat16() if v.is_floating_point() else v for k, v in GroupRational(2).state_dict().items()}
        module = GroupRational(2, "identity")
        module.load_state_dict(state, assign=True)
        assert module.numerator.dtype == module.denominator.dtype == torch.float32
        assert torch.equal(module.numerator, state["numerator"].float())


class TestWidth:
    def made_for(self, width, channel_dim=-1):
        module = GroupRational(4, "gelu", channel_dim=channel_dim)
        module.width = width
        return module

    def test_another_width_is_refused(self):
        module = self.made_for(8)
        assert module(torch.randn(2, 8)).shape == (2, 8)
        for shape in ((2, 4), (2, 16), (8, 2, 12)):
            with pytest.raises(ValueError, match=r"x must have 8 channels in dimension -1, .*got shape"):
                module(torch.randn(shape))
        first = self.made_for(8, channel_dim=1)
        assert first(torch.randn(2, 8, 3, 4)).shape == (2, 8, 3, 4)
        with pytest.raises(ValueError, match="x must have 8 channels in dimension 1"):
            first(torch.randn(2, 4, 3, 8))

    def test_it_is_kept(self):
        for twin in (copy.deepcopy(self.made_for(8)), pickle.loads(pickle.dumps(self.made_for(8)))):
            assert twin.width == 8
        assert GroupRational(4).width is None

    def test_a_part_of_the_channels_goes_with_its_part_of_the_coefficients(self):
        whole = self.made_for(8)
        with torch.no_grad():
            whole.numerator.add_(torch.randn_like(whole.numerator))
        x = torch.randn(3, 8)
        part = copy.deepcopy(whole)
        part.numerator = nn.Parameter(whole.numerator[12:])
        part.denominator = nn.Parameter(whole.denominator[8:])
        assert torch.equal(part(x[:, 4:]), whole(x)[:, 4:])
        with pytest.raises(ValueError, match="x must have 4 channels"):
            part(x)

    def test_coefficients_that_a_pruning_tool_cut_are_refused(self):
        """Such as Torch-Pruning, which takes a vector for one value for each channel."""
        module = self.made_for(8)
        module.numerator, module.denominator = (
            nn.Parameter(module.numerator[:18]),
            nn.Parameter(module.denominator[:12]),
        )
        with pytest.raises(ValueError, match=r"numerator must be a vector of 4 rows .*; got shape \(18,\).* prunes"):
            module(torch.randn(3, 6))

    def test_tracers_go_through(self):
        module, x = self.made_for(8), torch.randn(2, 8)
        for dynamic in (False, True):
            compiled = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=dynamic)
            torch.testing.assert_close(compiled(x), module(x))
        batch = torch.export.Dim("batch")
        program = torch.export.export(module, (x,), dynamic_shapes=({0: batch},))
        torch.testing.assert_close(program.module()(torch.ones(5, 8)), module(torch.ones(5, 8)))
        torch.testing.assert_close(torch.func.vmap(module)(x), module(x))
        torch.testing.assert_close(torch.jit.trace(module, x, check_trace=False)(x), module(x))
        assert module.to("meta")(x.to("meta")).shape == x.shape


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("order", [(5, 4), (3, 0)])
@pytest.mark.parametrize("share_numerator", [True, False])
def test_torchscript(order, share_numerator):
    init = (torch.randn(order[0] + 1), torch.randn(order[1]))
    module = GroupRational(4, init, order, share_numerator=share_numerator, channel_dim=1)
    x = torch.randn(2, 8, 3, 3)
    torch.testing.assert_close(torch.jit.script(module)(x), module(x))


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors(layout):
    module = GroupRational(2, "gelu")
    parts = [torch.randn(length, 4, requires_grad=True) for length in (3, 5)]
    y = module(torch.nested.as_nested_tensor(parts, layout=layout))
    assert (y.is_nested, y.layout) == (True, layout)
    for part, expected in zip(y.unbind(), parts, strict=True):
        torch.testing.assert_close(part, module(expected))
    sum(part.sum() for part in y.unbind()).backward()
    assert parts[1].grad.any()
    assert module.numerator.grad.any()


def test_parametrised_coefficients():
    class Halved(nn.Module):
        def forward(self, t):
            return t / 2

    module = GroupRational(2, "gelu")
    x = torch.randn(3, 4)
    expected = module(x) / 2
    parametrize.register_parametrization(module, "numerator", Halved())
    torch.testing.assert_close(module(x), expected)
    assert module.half().parametrizations.numerator.original.dtype == torch.float32


def test_rounded_coefficients_are_noticed_once():
    """As the mixed precision of FSDP gives them to forward. The parameters themselves stay float32."""
    module = GroupRational(2, "gelu")
    narrow = {name: p.bfloat16() for name, p in module.named_parameters()}
    rational._warn_of_narrow.cache_clear()
    with pytest.warns(RuntimeWarning, match=r"the coefficients of a rational function are bfloat16 here"):
        torch.func.functional_call(module, narrow, torch.randn(3, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.func.functional_call(module, narrow, torch.randn(3, 4))
        module.to(torch.bfloat16)(torch.randn(3, 4, dtype=torch.bfloat16))
