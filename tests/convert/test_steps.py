"""A step of the optimiser changes a function by about the learning rate, whatever the size of its inputs."""

import copy

import pytest
import torch
import torch.nn.utils.prune
from torch import nn

import grkan


@pytest.fixture
def model():
    torch.manual_seed(0)
    rational = grkan.GroupRational(2, init="gelu")
    return nn.Sequential(nn.Linear(6, 8), rational, nn.Linear(8, 3))


@pytest.fixture
def data():
    return [12.0 * torch.randn(200, 6, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]


def step(model, optimizer, x):
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


def expected_scales(rational, x):
    """Return min(1, rms(F) / rms(dF/dc)) by autograd, scalar by scalar."""
    numerator, denominator = rational.coefficients()
    found = []
    for group in range(rational.num_groups):
        scalars = x.unflatten(-1, (rational.num_groups, -1))[:, group].reshape(-1)
        a, b = (
            rows[group if len(rows) > 1 else 0].double().expand(len(scalars), -1).clone().requires_grad_()
            for rows in (numerator.detach(), denominator.detach())
        )
        y = grkan.group_rational(scalars.double()[None], a, b, form=rational.form)[0]
        gradients = torch.autograd.grad(y.sum(), (a, b))
        found.append([(y.square().mean() / g.square().mean(0)).sqrt().clamp(max=1.0).detach() for g in gradients])
    return [torch.cat(part).float() for part in zip(*found, strict=True)]


@pytest.mark.parametrize("form", ["abs_of_sum", "sum_of_abs"])
def test_the_scales(form, model, data):
    model[1] = grkan.GroupRational(2, init="gelu", form=form)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    scales = expected_scales(model[1], model[0](torch.cat(data)))
    assert float(scales[0].min()) < 1e-2
    assert float(scales[0].max()) > 0.1
    plain, scaled = copy.deepcopy(model), model
    other = torch.optim.SGD(plain.parameters(), lr=1e-3)
    grkan.scale_coefficient_steps(optimizer, scaled, data)
    for _ in range(2):  # the weights differ after the second step
        before = [p.detach().clone() for p in model.parameters()]
        plain.load_state_dict(scaled.state_dict())
        step(plain, other, data[0])
        step(scaled, optimizer, data[0])
        for name, p, q, old in zip(
            dict(model.named_parameters()), scaled.parameters(), plain.parameters(), before, strict=True
        ):
            moved, usual = p.detach() - old, q.detach() - old
            assert moved.abs().max() > 0
            if name in ("1.numerator", "1.denominator"):
                torch.testing.assert_close(moved, usual * scales[name == "1.denominator"], rtol=1e-3, atol=1e-7)
            else:
                torch.testing.assert_close(moved, usual, rtol=0, atol=0)


@pytest.mark.parametrize("size", [0.1, 1.0, 12.0])
def test_a_step_of_adam_changes_the_function_by_about_the_learning_rate(size, model, data):
    x = torch.cat(data) * size / 12
    inner = model[0](x).detach()
    before = model[1](inner).detach()
    optimizer = torch.optim.AdamW(grkan.param_groups(model, 0.0, lr=0.0, coefficient_lr=1e-3))
    grkan.scale_coefficient_steps(optimizer, model, x)
    step(model, optimizer, x)
    change = float(((model[1](inner) - before).norm() / before.norm()).detach())
    assert 1e-4 < change < 1e-2


def test_without_it_a_step_spoils_the_function(model, data):
    x = torch.cat(data)
    inner = model[0](x).detach()
    before = model[1](inner).detach()
    step(model, torch.optim.AdamW(grkan.param_groups(model, 0.0, lr=0.0, coefficient_lr=1e-3)), x)
    assert float(((model[1](inner) - before).norm() / before.norm()).detach()) > 0.1


def test_a_second_call_replaces_the_first(model, data):
    other = copy.deepcopy(model)
    results = []
    for part, calls in ((model, 1), (other, 2)):
        optimizer = torch.optim.AdamW(part.parameters(), lr=1e-3)
        for _ in range(calls):
            grkan.scale_coefficient_steps(optimizer, part, data)
        step(part, optimizer, data[0])
        results.append(part[1].numerator.detach())
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    "rational",
    [
        grkan.GroupRational(2, order=(3, 0), init=([0.1, 1.0, 0.2, 0.1], [])),
        grkan.GroupRational(8, init="identity"),
    ],
)
def test_every_kind_of_function(rational, model, data):
    model[1] = copy.deepcopy(rational)
    scales = expected_scales(model[1], model[0](torch.cat(data)))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    grkan.scale_coefficient_steps(optimizer, model, data)
    before = model[1].numerator.detach().clone()
    step(model, optimizer, data[0])
    moved = model[1].numerator.detach() - before
    torch.testing.assert_close(moved, -1e-3 * model[1].numerator.grad * scales[0], rtol=1e-2, atol=1e-6)
    assert all(p.isfinite().all() for p in model.parameters())


def scales_of(rational, calibration, model=None, **options):
    """Return what a step of 1 on every numerator coefficient becomes."""
    optimizer = torch.optim.SGD(rational.parameters(), lr=1.0)
    grkan.scale_coefficient_steps(optimizer, model or rational, calibration, **options)
    return step_of_one(rational, optimizer)


def step_of_one(rational, optimizer):
    before = rational.numerator.detach().clone()
    rational.numerator.grad = torch.ones_like(before)
    optimizer.step()
    return before - rational.numerator.detach()


def test_one_numerator_for_all_groups_is_measured_on_all(model, data):
    x = model[0](torch.cat(data)).detach()
    shared = grkan.GroupRational(2, init="gelu", share_numerator=True)
    scalars = x.flatten()[:, None]
    one = grkan.GroupRational(1, init="gelu")
    torch.testing.assert_close(scales_of(shared, x), expected_scales(one, scalars)[0], rtol=1e-3, atol=1e-7)


def test_zero_inputs_leave_the_steps_as_they_are():
    assert scales_of(grkan.GroupRational(2), torch.zeros(4, 8))[1].item() == pytest.approx(1.0)


def test_channels_in_another_dimension_and_nested_inputs(data):
    x = data[0].view(4, 50, 6)
    usual = scales_of(grkan.GroupRational(2), x)
    torch.testing.assert_close(scales_of(grkan.GroupRational(2, channel_dim=1), x.movedim(-1, 1)), usual)
    nested = torch.nested.nested_tensor(list(x), layout=torch.jagged)
    torch.testing.assert_close(scales_of(grkan.GroupRational(2), [(nested,)]), usual)


def test_a_long_input_is_sampled_at_random():
    """The first token of each sequence and one channel are unlike the others: both count for what they are."""
    torch.manual_seed(0)
    x = 9.0 * torch.randn(8192, 4, 8)
    x[:, 0] *= 0.01
    x[..., 3] *= 3
    long, short = (scales_of(grkan.GroupRational(1, init="gelu"), value) for value in (x, x[:500]))
    assert float(long[-1]) < 0.01
    torch.testing.assert_close(long, short, rtol=0.3, atol=1e-6)


def test_padding_does_not_count(data):
    x = data[0].view(4, 50, 6).clone()
    mask = torch.ones(4, 50)
    mask[:, 30:] = 0
    expected = scales_of(grkan.GroupRational(2), x[:, :30])
    x[:, 30:] = 1000.0
    padded = {"x": x, "attention_mask": mask}
    found = scales_of(grkan.GroupRational(2), [padded], forward=lambda model, batch: model(batch["x"]))
    torch.testing.assert_close(found, expected)


def test_the_wrapper_of_accelerate(model, data):
    accelerate = pytest.importorskip("accelerate")
    other = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    grkan.scale_coefficient_steps(optimizer, model, data)
    step(model, optimizer, data[0])
    accelerator = accelerate.Accelerator(cpu=True)
    other, optimizer = accelerator.prepare(other, torch.optim.AdamW(other.parameters(), lr=1e-3))
    grkan.scale_coefficient_steps(optimizer, other, data)
    step(other, optimizer, data[0])
    torch.testing.assert_close(other[1].numerator, model[1].numerator)


def test_the_wrapper_of_timm(model, data):
    lookahead = pytest.importorskip("timm.optim").Lookahead
    results = []
    for wrap in (lambda optimizer: optimizer, lookahead):
        part = copy.deepcopy(model)
        optimizer = wrap(torch.optim.AdamW(part.parameters(), lr=1e-3))
        grkan.scale_coefficient_steps(optimizer, part, data)
        step(part, optimizer, data[0])
        results.append(part[1].numerator.detach())
    torch.testing.assert_close(*results)


def test_an_optimiser_inside_another(model, data):
    class SAM(torch.optim.Optimizer):
        def __init__(self, inner):
            super().__init__(inner.param_groups, {})
            self.base_optimizer = inner

        def step(self, closure=None):
            self.base_optimizer.step()

    other = copy.deepcopy(model)
    for part, wrap in ((model, lambda inner: inner), (other, SAM)):
        optimizer = wrap(torch.optim.AdamW(part.parameters(), lr=1e-3))
        grkan.scale_coefficient_steps(optimizer, part, data)
        step(part, getattr(optimizer, "base_optimizer", optimizer), data[0])
    torch.testing.assert_close(model[1].numerator, other[1].numerator)


def test_functions_that_are_measured_later_are_added(data):
    first, second = grkan.GroupRational(2, init="gelu"), grkan.GroupRational(2, init="gelu")
    alone = scales_of(copy.deepcopy(first), data)
    optimizer = torch.optim.SGD([*first.parameters(), *second.parameters()], lr=1.0)
    grkan.scale_coefficient_steps(optimizer, first, data)
    grkan.scale_coefficient_steps(optimizer, second, data)
    for rational in (first, second):
        torch.testing.assert_close(step_of_one(rational, optimizer), alone)
        rational.numerator.grad = None


def test_an_optimiser_whose_parameters_were_exchanged(model, data):
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    grkan.scale_coefficient_steps(optimizer, model, data)
    other = copy.deepcopy(model)
    optimizer.param_groups[0]["params"] = list(other.parameters())
    with pytest.raises(
        ValueError, match="optimizer must keep the coefficients that scale_coefficient_steps has measured"
    ):
        step(other, optimizer, data[0])


def test_frozen_functions_and_parameters_need_no_data(model, data):
    """As the original module that PEFT keeps beside the one that it trains."""
    both = nn.ModuleDict({"used": model, "kept": copy.deepcopy(model).requires_grad_(False)})
    model[1].denominator.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in both.parameters() if p is not model[1].denominator], lr=1e-3)
    grkan.scale_coefficient_steps(optimizer, both, data, forward=lambda given, batch: given["used"](batch))
    step(model, optimizer, data[0])
    assert model[1].numerator.isfinite().all()


def test_an_optimiser_that_calls_no_hooks_is_refused(model, data):
    class Own(torch.optim.Optimizer):
        def __init__(self, parameters):
            self.param_groups = [{"params": list(parameters)}]

        def step(self):
            pass

    with pytest.raises(TypeError, match=r"optimizer must call the step hooks of torch\.optim\.Optimizer; Own does not"):
        grkan.scale_coefficient_steps(Own(model.parameters()), model, data)


class ScheduleFree(torch.optim.SGD):
    def train(self):
        pass

    eval = train


class ScheduleFreeWrapper(torch.optim.Optimizer):
    def __init__(self, inner):
        super().__init__(inner.param_groups, {})
        self.optimizer = inner

    train = eval = step = ScheduleFree.train


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (torch.optim.LBFGS, "LBFGS needs a closure"),
        (ScheduleFree, r"ScheduleFree has train\(\) and eval\(\)"),
        (lambda parameters: ScheduleFreeWrapper(torch.optim.SGD(parameters)), "ScheduleFreeWrapper has train"),
    ],
)
def test_an_optimiser_whose_steps_are_no_changes_of_the_parameters_is_refused(make, message, model, data):
    optimizer = make(model.parameters())
    with pytest.raises(TypeError, match=f"optimizer must take steps that are added to the parameters.*{message}"):
        grkan.scale_coefficient_steps(optimizer, model, data)
    assert not optimizer._optimizer_step_pre_hooks


def test_every_other_optimiser_of_pytorch_is_accepted(data):
    """But Muon, which takes only matrices."""
    for name, kind in vars(torch.optim).items():
        if isinstance(kind, type) and name not in ("Optimizer", "LBFGS", "Muon", "SparseAdam"):
            rational = grkan.GroupRational(2)
            grkan.scale_coefficient_steps(kind(rational.parameters()), rational, data)


def test_the_run_leaves_the_model_as_it_was(model, data):
    model.insert(2, nn.Dropout(0.5))
    before = copy.deepcopy(model.state_dict())
    seen = []

    def forward(given, batch):
        seen.append(given.training)
        return given(batch["x"])

    optimizer = torch.optim.AdamW(model.parameters())
    grkan.scale_coefficient_steps(optimizer, model, [{"x": data[0]}], forward=forward)
    assert seen == [False]
    assert model.training
    assert not model[1]._forward_pre_hooks
    assert all(p.grad is None for p in model.parameters())
    torch.testing.assert_close(model.state_dict(), before)


def test_mistakes(model, data):
    optimizer = torch.optim.AdamW(model.parameters())
    scale = grkan.scale_coefficient_steps
    with pytest.raises(TypeError, match=r"optimizer must be a torch\.optim\.Optimizer; got Sequential"):
        scale(model, model, data)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        scale(optimizer, data, data)
    with pytest.raises(TypeError, match="calibration must be an iterable"):
        scale(optimizer, model, 3)
    with pytest.raises(TypeError, match="forward must be callable"):
        scale(optimizer, model, data, forward=3)
    with pytest.raises(ValueError, match="calibration must have at least one batch"):
        scale(optimizer, model, [])
    with pytest.raises(ValueError, match=r"batch 1 raises RuntimeError: .*shape"):
        scale(optimizer, model, [data[0], torch.randn(2, 5)])
    with pytest.raises(ValueError, match="calibration must lead to finite values; F of 1 or a derivative is not"):
        scale(optimizer, model, torch.full((2, 6), float("nan")))
    with pytest.raises(ValueError, match="optimizer must have coefficients of the model's rational functions"):
        scale(torch.optim.AdamW(model[0].parameters()), model, data)
    with pytest.raises(ValueError, match="calibration must reach every function; none reaches 1"):
        scale(optimizer, model, data, forward=lambda given, batch: given[0](batch))
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    pruned = copy.deepcopy(model)
    nn.utils.prune.identity(pruned[1], "numerator")
    with pytest.raises(ValueError, match="model must have plain coefficients; those of 1 are parametrised"):
        scale(torch.optim.AdamW(pruned.parameters()), pruned, data)
    nn.utils.parametrize.register_parametrization(model[1], "numerator", nn.Hardtanh())
    with pytest.raises(ValueError, match="model must have plain coefficients; those of 1 are parametrised"):
        scale(torch.optim.AdamW(model.parameters()), model, data)
