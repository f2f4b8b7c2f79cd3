"""What is compared after a conversion, in how much memory, and what happens where it is too far off."""

import copy
import gc
import types

import pytest
import torch
from torch import nn

from grkan.convert import convert_
from grkan.convert.compare import KeptBatches, main_output
from grkan.convert.recipe import recipe_of
from grkan.nn import GroupRational


def data(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mlp(act=None, width=16):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, 32), act or nn.ReLU(), nn.Linear(32, width)).eval()


class Wave(nn.Module):
    """What no rational function of a low order can follow."""

    def forward(self, x):
        return torch.sin(20 * x)


class Classifier(nn.Module):
    """Returns what transformers' models return."""

    def __init__(self, kind="dict"):
        super().__init__()
        self.mlp, self.kind = mlp(), kind

    def forward(self, x, labels=None):
        logits = self.mlp(x)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        if self.kind == "dict":
            return {"loss": loss, "logits": logits}
        return (loss, logits) if self.kind == "tuple" else loss

    def generate(self, x):
        """A step of it, as tokens."""
        return self(x)["logits"].argmax(-1)


def error(model, before, x):
    with torch.no_grad():
        after = model.mlp(x)
    return float((after - before).norm() / before.norm())


@pytest.mark.parametrize("kind", ["dict", "tuple", "loss"])
def test_the_loss_is_not_what_a_model_computes(kind):
    model, x = Classifier(kind), data(64, 16)
    before = model.mlp(x).detach()
    report = convert_(model, calibration=[{"x": x, "labels": torch.arange(64) % 16}])
    assert report.relative_error == pytest.approx(error(model, before, x), rel=1e-3)
    assert 1e-3 < report.relative_error < 0.05
    assert report.cosine < 0.99999


def test_what_generates_tokens_is_compared_by_its_logits():
    model, x = Classifier(), data(64, 16)
    before = model.mlp(x).detach()
    report = convert_(model, calibration=[x], forward=lambda model, batch: model.generate(batch))
    assert report.relative_error == pytest.approx(error(model, before, x), rel=1e-3)


def test_zeros_of_a_new_head_are_not_compared():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp, self.head = mlp(), nn.Linear(16, 3)
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

        def forward(self, x):
            return self.head(self.mlp(x))

    model, x = Model(), data(64, 16)
    before = model.mlp(x).detach()
    report = convert_(model, calibration=[x])
    assert report.relative_error == pytest.approx(error(model, before, x), rel=1e-3)
    assert 1e-3 < report.relative_error < 0.05

    nothing = nn.Sequential(Model(), nn.Linear(3, 3, bias=False)).apply(
        lambda module: nn.init.zeros_(module.weight) if isinstance(module, nn.Linear) else None
    )
    with torch.no_grad():
        nothing[0].mlp[0].bias.zero_()
        nothing[0].mlp[2].bias.zero_()
    report = convert_(nothing, calibration=[x])
    assert (report.cosine, report.relative_error) == (None, None)


def test_the_first_output_that_is_no_loss():
    logits, states = data(2, 3), data(2, 3, 4)
    assert main_output({"loss": data(2), "aux_loss": data(3), "logits": logits}) is logits
    assert main_output((torch.tensor(1.0), (torch.arange(3), states))) is states
    assert main_output(types.SimpleNamespace(logits=logits)) is None
    assert main_output({"sequences": torch.arange(3), "scores": (logits, states)}) is logits
    assert main_output(data(1, 1)) is not None
    assert main_output(torch.tensor(1.0)) is None


def test_masked_logits_and_padding_are_left_out():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp = mlp()

        def forward(self, x, attention_mask):
            y = self.mlp(x)
            y = torch.where(attention_mask[..., None] > 0, y, 1e4)
            return torch.cat([y, torch.full_like(y[..., :1], -torch.inf)], -1)

    model, x, mask = Model(), data(4, 10, 16), torch.ones(4, 10).tril()
    real = x[mask > 0]
    before = model.mlp(real).detach()
    report = convert_(model, calibration={"x": x, "attention_mask": mask})
    assert report.relative_error == pytest.approx(error(model, before, real), rel=1e-3)


@pytest.mark.parametrize("count", [3, 10, 100, 1000])
def test_the_batches_that_are_kept_are_few_and_spread(count):
    kept = KeptBatches(nn.Identity(), lambda model, batch: model(batch))
    for number in range(count):
        kept.feed(number, torch.full((2, 3), float(number)))
    numbers = [number for number, _, _ in kept.kept]
    assert numbers[0] == 0
    assert min(count, 3) <= len(numbers) <= max(4, min(64, count / 4))
    assert numbers[-1] >= 0.6 * (count - 1)
    assert all(torch.equal(output, torch.full((2, 3), float(number))) for number, _, output in kept.kept)


def test_large_batches_and_outputs_take_bounded_memory():
    kept = KeptBatches(nn.Identity(), lambda model, batch: batch[:1].expand(1, 2**22).reshape(2**12, 2**10))
    for number in range(40):
        kept.feed(number, torch.zeros(2**21))  # 8 MiB
    gc.collect()
    assert sum(batch.nbytes + output.nbytes for _, batch, output in kept.kept) <= 2**25
    assert all(output.untyped_storage().nbytes() <= 2**22 for _, _, output in kept.kept)


def test_an_mlp_that_is_too_far_off_stays():
    model = nn.Sequential(mlp(), nn.Sequential(nn.Linear(16, 32), Wave(), nn.Linear(32, 16)))
    wave, x = model[1], data(256, 16)
    state = copy.deepcopy(wave.state_dict())
    report = convert_(model, calibration=x)
    assert isinstance(model[0][1], GroupRational)
    assert [type(module) for module in wave] == [nn.Linear, Wave, nn.Linear]
    assert all(torch.equal(value, state[name]) for name, value in wave.state_dict().items())
    assert [layer["name"] for layer in report.layers] == ["0"]
    ((name, reason),) = report.skipped
    assert name == "1"
    assert "its output would be off by" in reason
    assert "max_error=0.05" in reason
    assert "order (5, 4)" in reason


@pytest.mark.parametrize("calibrated", [True, False])
def test_max_error_is_the_callers(calibrated):
    x = data(256, 16) if calibrated else None
    with pytest.raises(ValueError, match=r"its output would be off by 0\.\d+, above max_error=0.0001"):
        convert_(mlp(), calibration=x, max_error=1e-4)
    report = convert_(mlp(Wave()), calibration=x, max_error=float("inf"))
    assert report.layers[0]["output_error"] > 0.3
    for wrong, kind in ((0, ValueError), (-1.0, ValueError), (float("nan"), ValueError), ("1%", TypeError)):
        with pytest.raises(kind, match="max_error must be"):
            convert_(mlp(), calibration=x, max_error=wrong)


def test_the_error_of_an_output_is_that_of_the_second_layer():
    model, x = mlp(), data(512, 16)
    before = model(x).detach()
    (layer,) = convert_(model, calibration=x).layers
    after = model(x).detach()
    assert layer["output_error"] == pytest.approx(float((after - before).norm() / before.norm()), rel=0.02)
    assert layer["best_relative_error"] <= layer["relative_error"]
    assert layer["best_rms_error"] <= layer["rms_error"]


def test_rows_of_usual_size_count_by_themselves():
    """One large row hides what happens to the others in the norm of all."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32, bias=False), Wave2(), nn.Linear(32, 16, bias=False))
    x = data(512, 16)
    x[0] *= 1e4
    with pytest.raises(ValueError, match="its output would be off by"):
        convert_(model, calibration=x)


class Wave2(nn.Module):
    """A wave on a line."""

    def forward(self, x):
        return x / 10 + torch.sin(20 * x)


class Amplifier(nn.Module):
    """What is behind the MLP makes much of small differences, as a router does."""

    def __init__(self):
        super().__init__()
        self.mlp = mlp()

    def forward(self, x):
        return torch.sin(1e3 * self.mlp(x))


def test_a_model_that_amplifies_is_returned_with_a_warning():
    model, x = Amplifier(), data(64, 16)
    with pytest.warns(UserWarning, match=r"off by [0-9.]+, above max_error=0.05, although each MLP") as warned:
        report = convert_(model, calibration=x)
    assert warned[0].filename == __file__  # where the user calls it
    assert report.relative_error > 0.05
    assert isinstance(model.mlp[1], GroupRational)
    assert len(recipe_of(model).layers) == 1


class Peeking(nn.Module):
    """Its forward uses more of its activation than a function that takes its place can give."""

    def __init__(self):
        super().__init__()
        self.up, self.act, self.down = nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)

    def forward(self, x):
        y = self.down(self.act(self.up(x)))
        return 2 * y if isinstance(self.act, GroupRational) else y


def test_a_model_that_would_be_wrong_is_left_as_it_was():
    model = nn.Sequential(Peeking(), mlp()).eval()
    x = data(64, 16)
    before = model(x).detach()
    with pytest.raises(ValueError, match=r"its output would be off by .*: 0: "):
        convert_(model, calibration=x)
    assert torch.equal(model(x), before)
    assert isinstance(model[0].act, nn.ReLU)
    assert isinstance(model[1][1], nn.ReLU)
    assert recipe_of(model) is None
