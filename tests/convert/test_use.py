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


class WithFallback(WithArgument):
    def forward(self, x, slope=None):
        if slope is None:
            slope = 0.1
        return self.fc2(F.leaky_relu(self.fc1(x), slope))


class Checkpointed(WithArgument):
    """As activation checkpointing is often written."""

    def forward(self, x, slope=0.1):
        def run(h):
            return self.fc2(F.leaky_relu(self.fc1(h), slope))

        return torch.utils.checkpoint.checkpoint(run, x, use_reentrant=False)


class ByItsMode(WithArgument):
    def forward(self, x):
        slope = 0.9 if self.training else 0.1
        return self.fc2(F.leaky_relu(self.fc1(x), slope))


class LearnedThreshold(WithArgument):
    def __init__(self):
        super().__init__()
        self.of = nn.ParameterDict({"threshold": nn.Parameter(torch.zeros(()))})

    def forward(self, x):
        return self.fc2(torch.clamp_min(self.fc1(x), self.of["threshold"]))


class LearnedThresholdInAVariable(LearnedThreshold):
    def forward(self, x):
        threshold = self.of["threshold"]
        return self.fc2(torch.clamp_min(self.fc1(x), threshold))


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
    WithFallback: "slope may change from call to call",
    Checkpointed: "slope may change from call to call",
    ByItsMode: "slope may change from call to call",
    LearnedThresholdInAVariable: "threshold may change from call to call",
    LearnedThreshold: r"self.of\['threshold'\] is a tensor of the model",
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


class AssignedOnce(WithArgument):
    slope = 0.1

    def forward(self, x):
        negative: float = self.slope
        h = self.fc1(x)
        return self.fc2(F.leaky_relu(h, negative))


class Imported(WithArgument):
    def forward(self, x):
        import torch.nn.functional as functional

        return self.fc2(functional.leaky_relu(self.fc1(x), 0.1))


class OfTwo(AssignedOnce):
    def forward(self, x):
        negative, _ = self.slope, 1
        return self.fc2(F.leaky_relu(self.fc1(x), negative))


class InALoop(WithArgument):
    def forward(self, x):
        for fc in (self.fc2,):
            negative = 0.1
            x = fc(F.leaky_relu(self.fc1(x), negative))
        return x


@pytest.mark.parametrize("make", [AssignedOnce, Imported, OfTwo, InALoop])
def test_a_variable_that_means_the_same_in_every_call(make):
    model = make().eval()
    before = model(data())
    grkan.convert_(model, calibration=[data()], order=(7, 6))
    assert isinstance(model.act, GroupRational)
    assert (model(data()) - before).norm() < 0.05 * before.norm()


def test_a_layer_that_looks_at_its_first_batch():
    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.mlp = None, Method()

        def forward(self, x):
            if self.scale is None:
                self.scale = 2.0 + x.std().item()
                return self.mlp(x)
            return self.mlp(x / self.scale)

    class Method(WithArgument):
        def forward(self, x):
            return self.fc2(F.gelu(self.fc1(x)))

    report = grkan.convert_(First(), calibration=[data()])
    assert [layer["name"] for layer in report.layers] == ["mlp"]


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
        assert (model(data()) - before).norm() < 0.1 * before.norm()
        if make is WithMethods:
            assert model.numbers() == 7
        else:
            assert torch.equal(model(hidden_states=data()), model(data()))


def test_a_model_made_in_inference_mode():
    with torch.inference_mode():
        model = MLP()
        before = list(model.state_dict())
        with pytest.raises(ValueError, match="they are inference tensors"):
            grkan.convert_(model, start="scratch")
    assert list(model.state_dict()) == before


def test_the_users_random_numbers_stay():
    model = nn.Sequential(Dropping(), MLP(DroppingActivation()))
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    grkan.convert_(model, calibration=[data()])
    assert torch.equal(torch.rand(1), expected)


def test_the_recipe_of_a_model_with_compiled_parts():
    model = nn.Sequential(
        torch.compile(nn.Sequential(MLP())), nn.Sequential(nn.Linear(16, 8), nn.GELU(), nn.Linear(8, 4))
    )
    recipe = grkan.convert_(model, calibration=[data()]).recipe
    again = nn.Sequential(
        torch.compile(nn.Sequential(MLP())), nn.Sequential(nn.Linear(16, 8), nn.GELU(), nn.Linear(8, 4))
    )
    grkan.apply_conversion_(again, recipe)
    again.load_state_dict(model.state_dict())
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(again(data()), model(data()))


@pytest.mark.parametrize("calibration", [None, data()])
def test_nothing_is_compiled_during_a_conversion(calibration):
    compiled = []

    def backend(graph, _):
        compiled.append(graph)
        return graph.forward

    model = nn.Sequential(
        torch.compile(MLP(), backend=backend), nn.LayerNorm(16), torch.compile(MLP(), backend=backend)
    )
    grkan.convert_(model, calibration=calibration)
    assert not compiled
    model(data())
    assert compiled


def test_a_container_that_is_built_anew_is_noticed(tmp_path):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16), nn.LayerNorm(16))

        def forward(self, x):
            return self.layers(x)

    model = Model()
    grkan.convert_(model, calibration=[data()])
    model.layers = model.layers[:3]
    with pytest.raises(ValueError, match=r"layers\.\S+ is not: a container around it was built anew"):
        grkan.save_model(model, tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


def test_an_activation_put_back_and_converted_again(tmp_path):
    def make():
        return nn.Sequential(nn.Linear(16, 64), GEGLU(), nn.Linear(32, 16))

    model = make()
    grkan.convert_(model, calibration=[data()])
    model[1].act = nn.SiLU()
    grkan.convert_(model, calibration=[data()])
    grkan.save_model(model, tmp_path / "model.safetensors")
    loaded = grkan.load_model(tmp_path / "model.safetensors", make())
    assert torch.equal(loaded(data()), model(data()))


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
