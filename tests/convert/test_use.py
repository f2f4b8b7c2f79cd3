"""Models that use an activation in ways that a rational function in its place cannot follow."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import grkan
from grkan.nn import GRKAN, GroupRational


class MLP(nn.Module):
    """Two linear layers and an activation, for the forward of a subclass."""

    def __init__(self, act=None):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(16, 32), act or nn.GELU(), nn.Linear(32, 16)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class InPlaceAndItsOutput(MLP):
    def __init__(self):
        super().__init__(nn.ReLU(inplace=True))

    def forward(self, x):
        h = self.fc1(x)
        y = self.act(h)
        return self.fc2(h + y)


class ByItsClass(MLP):
    def forward(self, x):
        h = self.fc1(x)
        return self.fc2(self.act(h) if isinstance(self.act, nn.GELU) else h)


class ByKeyword(MLP):
    def forward(self, x):
        return self.fc2(self.act(input=self.fc1(x)))


class Stored(nn.Module):
    """It calls a method that it stored before, and so never a later one."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(16, 32), nn.Linear(32, 16)
        self.run = self.feed_forward

    def feed_forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))

    def forward(self, x):
        return self.run(x)


class Loop(nn.Module):
    """One call, another function each time."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

    def forward(self, x):
        for layer, act in zip(self.layers, (F.relu, torch.tanh, None), strict=True):
            x = layer(x) if act is None else act(layer(x))
        return x


class WithArgument(nn.Module):
    """One call, another slope each time."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x, slope):
        return self.fc2(F.leaky_relu(self.fc1(x), slope))


class Arguments(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = WithArgument()

    def forward(self, x):
        return self.mlp(x, 0.0) + self.mlp(x, 0.9)


def random_in_training():
    return MLP(nn.RReLU())


def data(rows=64):
    return torch.randn(rows, 16, generator=torch.Generator().manual_seed(0))


PLACE = r"the model computes something else, or fails, when another module takes its place"
REFUSED = {
    InPlaceAndItsOutput: PLACE,
    ByItsClass: PLACE,
    ByKeyword: PLACE,
    Stored: "does not call a module that takes its place",
    Loop: "act may change from call to call",
    Arguments: "slope may change from call to call",
    random_in_training: "it does something else in training",
}


@pytest.mark.parametrize("arguments", [{"calibration": data()}, {}, {"start": "scratch"}], ids=lambda a: "-".join(a))
@pytest.mark.parametrize("make", REFUSED)
def test_what_cannot_take_its_place_is_refused(make, arguments):
    model = make().eval()
    before, state = model(data()), list(model.state_dict())
    with pytest.raises(ValueError, match=REFUSED[make]):
        grkan.convert_(model, **arguments)
    assert torch.equal(model(data()), before)
    assert list(model.state_dict()) == state


def test_others_are_converted():
    model = nn.Sequential(MLP(), ByKeyword(), ByItsClass(), MLP()).eval()
    before = model(data())
    report = grkan.convert_(model, calibration=[data()])
    assert [layer["name"] for layer in report.layers] == ["0", "3"]
    assert [name for name, _ in report.skipped] == ["1.act", "2.act"]
    assert (model(data()) - before).norm() < 0.02 * before.norm()


class Assigned(nn.Module):
    """Variables that mean the same in every call."""

    slope = 0.1

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        negative = self.slope
        h = self.fc1(x)
        y = F.leaky_relu(h, negative)
        return self.fc2(y)


def test_a_variable_that_means_the_same_in_every_call():
    model = Assigned().eval()
    before = model(data())
    grkan.convert_(model, calibration=[data()], order=(7, 6))
    assert isinstance(model.act, GroupRational)
    assert (model(data()) - before).norm() < 0.05 * before.norm()


class Gated(nn.Module):
    """Swish with a learned factor, which a rational function in its place could not learn."""

    def __init__(self):
        super().__init__()
        self.fc1, self.beta, self.fc2 = nn.Linear(16, 32), nn.Parameter(torch.ones(1)), nn.Linear(32, 16)
        self.rest = MLP()

    def forward(self, x):
        h = self.fc1(x)
        return self.rest(self.fc2(h * torch.sigmoid(self.beta * h)))


def test_a_learned_factor_stays():
    model = Gated()
    report = grkan.convert_(model, calibration=[data()])
    assert [layer["name"] for layer in report.layers] == ["rest"]
    assert ["sigmoid" in reason for _, reason in report.skipped] == [True]
    model(data()).sum().backward()
    assert model.beta.grad.abs() > 0


class Dropping(MLP):
    def forward(self, x):
        return self.fc2(F.dropout(self.act(self.fc1(x)), 0.3, self.training))


class DroppingActivation(nn.Module):
    def forward(self, x):
        return F.dropout(F.gelu(x), 0.3, self.training)


@pytest.mark.parametrize("make", [Dropping, lambda: MLP(DroppingActivation())])
def test_dropout_in_a_forward_stays(make):
    model = make().eval()
    before = model(data())
    grkan.convert_(model, calibration=[data()])
    assert (model(data()) - before).norm() < 0.02 * before.norm()
    assert any(isinstance(module, GroupRational) for module in model.modules())
    model.train()
    assert not torch.equal(model(data()), model(data()))


class Named(MLP):
    def forward(self, hidden_states):
        return self.fc2(self.act(self.fc1(hidden_states)))


class WithMethods(MLP):
    def numbers(self):
        return 7


@pytest.mark.parametrize("calibrated", [True, False])
def test_a_class_with_more_than_timms_stays(calibrated):
    """Only the layout "grkan" changes the class, and with it the names of arguments and the methods."""
    for make in (Named, WithMethods):
        model = make().eval()
        before = model(data())
        grkan.convert_(model, calibration=[data()] if calibrated else None)
        assert isinstance(model, make)
        assert (model(data()) - before).norm() < 0.1 * before.norm()
    assert WithMethods().numbers() == 7
    assert Named()(hidden_states=data()).shape == (64, 16)


def test_in_inference_mode():
    model = MLP()
    with torch.inference_mode():
        report = grkan.convert_(model, calibration=[data()])
    other = MLP()
    with torch.inference_mode():
        grkan.apply_conversion_(other, report.recipe)
    for converted in (model, other):
        assert isinstance(converted, GRKAN)
        converted(data()).sum().backward()
        assert converted.act2.numerator.grad.abs().sum() > 0


class GEGLU(nn.Module):
    """A module without weights."""

    def forward(self, x):
        y, gate = x.chunk(2, -1)
        return y * F.gelu(gate)


@pytest.mark.parametrize("kind", [{"device": "meta"}, {"dtype": torch.float64}], ids=str)
def test_coefficients_are_placed_as_the_weights_around_them(kind):
    def make():
        return nn.Sequential(nn.Linear(16, 64), GEGLU(), nn.Linear(32, 16))

    recipe = grkan.convert_(make(), calibration=[data()]).recipe
    model = make().to(**kind)
    grkan.apply_conversion_(model, recipe)
    assert len({(p.device, p.dtype) for p in model.parameters()}) == 1


def test_the_users_variables_are_not_kept():
    """Nor the model: Python keeps a copy of a frame's variables once they are read from outside."""

    def convert_and_delete():
        model, other = MLP(), torch.zeros(9)
        parts = [weakref.ref(p) for p in (*model.parameters(), other)]
        grkan.convert_(model, calibration=[data()])
        del model, other
        gc.collect()
        return sum(part() is not None for part in parts)

    assert convert_and_delete() == 0


@pytest.mark.parametrize("start", ["pretrained", "scratch"])
def test_a_deleted_model_frees_its_memory(start):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

        def init_weights(self):
            """As timm's models have it."""

        def forward(self, x):
            return self.mlp(x)

    model = Model()
    grkan.convert_(model, calibration=[data()], start=start)
    parameters = [weakref.ref(p) for p in model.parameters()]
    gc.collect()
    gc.disable()
    try:
        del model
        assert not any(parameter() is not None for parameter in parameters)
    finally:
        gc.enable()
