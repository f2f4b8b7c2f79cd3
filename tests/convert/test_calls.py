"""A call in `forward` becomes one of a child: in copies, pickles, compiled and exported programs, and from a recipe."""

import copy
import functools
import json
import linecache
import pickle
import re
import sys
import types
from contextlib import ExitStack

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import grkan
from grkan.convert import apply_conversion_, convert_
from grkan.convert.calls import CallRecipe, check, lift
from grkan.nn import GroupRational, RationalLinear


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(16, 32), nn.Linear(32, 16)
        self.__factor = 2.0

    def forward(self, x):
        return x


class MLP(Layers):
    def forward(self, x: torch.Tensor, *, scale: float = 0.5) -> torch.Tensor:
        """One call, with a docstring
        of two lines."""
        return scale * self.fc2(F.gelu(self.fc1(x)))


def decorated(method):
    @functools.wraps(method)
    def wrapper(self, *arguments, **named):
        return method(self, *arguments, **named)

    return wrapper


class Intricate(Layers):
    """super(), a name of the class's own, a decorator, a function within, checkpointing, and two calls alike."""

    def __init__(self):
        super().__init__()
        self.__bias = 0.25

    @decorated
    def forward(self, x):
        x = super().forward(x)

        def up(y):
            return F.silu(self.fc1(y)) + self.__bias

        if self.training:
            return self.fc2(checkpoint(self.part, checkpoint(up, x, use_reentrant=False), use_reentrant=False))
        return self.fc2(self.part(up(x)))

    def part(self, y):
        return y * 1.0


def data(seed=0):
    return torch.randn(64, 16, generator=torch.Generator().manual_seed(seed))


def convert(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(16), kind(), kind())
    before = model(data())
    report = convert_(model, calibration=data())
    assert len(report.layers) == 2
    assert float((model(data()) - before).norm() / before.norm()) < 0.01
    return model, report


@pytest.fixture(params=[MLP, Intricate])
def converted(request):
    return (*convert(request.param), request.param)


def test_the_module_stays_what_it_is(converted):
    model, _, kind = converted
    for mlp in (model[1], model[2]):
        assert isinstance(mlp, kind)
        assert type(mlp).__name__ == kind.__name__
        assert isinstance(mlp.act, GroupRational)
        assert isinstance(mlp.fc1, RationalLinear) == (kind is MLP)
    assert type(model[1]) is type(model[2])
    assert type(kind()) is kind


def test_arguments_keep_their_values():
    model, _ = convert(MLP)
    x = data()
    torch.testing.assert_close(model[1](x, scale=1.0), 2 * model[1](x))
    assert type(model[1]).forward.__doc__ == MLP.forward.__doc__
    assert type(model[1]).forward.__annotations__ == MLP.forward.__annotations__


def test_copies_and_pickles(converted):
    model, _, _ = converted
    x = data()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin[1]) is type(model[1])
        assert torch.equal(twin(x), model(x))
        with torch.no_grad():
            twin[1].act.numerator.add_(0.1)
        assert not torch.equal(twin(x), model(x))


def test_training_through_checkpoints(converted):
    model, _, _ = converted
    model.train()(data()).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_compiled_and_exported(converted):
    model, _, _ = converted
    x = data()
    with torch.no_grad():
        expected = model.eval()(x)
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), expected)
        torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)
        torch.testing.assert_close(torch.jit.trace(model, x)(x), expected)
        torch.testing.assert_close(grkan.plain(model)(x), expected, rtol=1e-4, atol=1e-5)


def test_a_recipe(converted):
    model, report, kind = converted
    torch.manual_seed(0)
    twin = nn.Sequential(nn.LayerNorm(16), kind(), kind())
    recipe = json.loads(json.dumps(report.recipe))
    assert recipe["layers"][0]["call"]["method"] == "forward"
    apply_conversion_(twin, recipe)
    assert torch.equal(twin(data()), model(data()))
    assert list(twin.state_dict()) == list(model.state_dict())
    other = nn.Sequential(nn.LayerNorm(16), Layers(), Layers())
    with pytest.raises(ValueError, match=r"does not fit the model.*does not contain F"):
        apply_conversion_(other, recipe)
    assert type(other[1]) is Layers
    with pytest.raises(ValueError, match="already"):
        apply_conversion_(twin, recipe)


def test_a_file(tmp_path):
    model, _ = convert(MLP)
    grkan.save_model(model, tmp_path / "m.safetensors")
    loaded = grkan.load_model(tmp_path / "m.safetensors", nn.Sequential(nn.LayerNorm(16), MLP(), MLP()))
    assert torch.equal(loaded(data()), model.eval()(data()))


class Inplace(Layers):
    def forward(self, x):
        x = self.fc1(x)
        F.relu_(x)
        return self.fc2(x)


class Child(MLP):
    def forward(self, x):
        return super().forward(x)


class Pickled(MLP):
    def __reduce__(self):
        return Pickled, ()


def recursive(method):
    def wrapper(self, x, again=True):
        return wrapper(self, x, False) if again else method(self, x)

    return wrapper


class Recursive(Layers):
    @recursive
    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


def replaced():
    model = MLP()
    model.forward = model.forward
    return model


namespace = {"Layers": Layers, "F": F}
exec("class Nowhere(Layers):\n def forward(self, x):\n  return self.fc2(F.gelu(self.fc1(x)))", namespace)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Inplace, r"F.relu_\(x\) works in place"),
        (Child, "super"),
        (Recursive, "a decorator of forward calls itself"),
        (Pickled, "Pickled defines its own pickling"),
        (replaced, "its forward has been replaced"),
        (namespace["Nowhere"], "the source of forward is not available"),
    ],
    ids=["in place", "super", "recursive decorator", "pickled", "replaced", "no source"],
)
def test_calls_that_cannot_be_changed_are_named(make, reason):
    model = nn.Sequential(nn.LayerNorm(16), make(), nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)))
    kind, report = type(model[1]), convert_(model, calibration=data())
    assert [layer["name"] for layer in report.layers] == ["2"]
    ((name, text),) = report.skipped
    assert name == "1"
    assert "make it a child, such as self.act = nn.GELU()" in text
    assert re.search(reason, text)
    assert type(model[1]) is kind


def test_a_lift_is_undone():
    model, undo = MLP(), ExitStack()
    expected = model(data())
    lift(model, CallRecipe("forward", "F.gelu(self.fc1(x))", "self.fc1(x)", 0), "act", nn.ReLU(), undo)
    assert not torch.equal(model(data()), expected)
    with pytest.raises(ValueError, match="already has an attribute named fc1"):
        lift(model, CallRecipe("forward", "self.fc1(x)", "x", 0), "fc1", nn.ReLU(), undo)
    undo.close()
    assert type(model) is MLP
    assert list(model._modules) == ["fc1", "fc2"]
    assert torch.equal(model(data()), expected)


class Renamed(MLP):
    """Has the call of its parent."""


def test_another_class_keeps_the_changed_calls():
    """dill and other tools set the class by its name, which is that of the original one."""
    model, _ = convert(MLP)
    mlp, x = model[1], data()
    expected, changed = mlp(x), type(mlp)
    for kind in (Renamed, MLP, changed, type("Dynamic", (changed,), {}), MLP):
        mlp.__class__ = kind
        assert mlp.__class__ is type(mlp)
        assert isinstance(mlp, kind)
        assert torch.equal(mlp(x), expected)
    assert type(mlp) is changed
    message = r"__class__ must be a class with F\.gelu\(self\.fc1\(x\)\), .*got Layers: its forward does not contain F"
    with pytest.raises(ValueError, match=message):
        mlp.__class__ = Layers
    with pytest.raises(TypeError):
        mlp.__class__ = "MLP"
    assert type(mlp) is changed


def test_a_subclass_of_a_changed_class():
    """As parametrisations and FSDP2 make them; it can be copied, converted and undone."""
    mlp, x, call = MLP(), data(), CallRecipe("forward", "F.gelu(self.fc1(x))", "self.fc1(x)", 0)
    outer, inner = ExitStack(), ExitStack()
    lift(mlp, call, "act", nn.ReLU(), outer)
    mlp.__class__ = kind = type("Dynamic", (type(mlp),), {})
    expected = mlp(x)
    twin = copy.deepcopy(mlp)
    assert type(twin) is kind
    assert torch.equal(twin(x), expected)
    lift(mlp, CallRecipe("forward", "self.act(self.fc1(x))", "self.fc1(x)", 0), "second", nn.Tanh(), inner)
    assert isinstance(mlp, kind)
    twin = copy.deepcopy(mlp)
    assert type(twin) is type(mlp)
    assert torch.equal(twin(x), mlp(x))
    assert not torch.equal(twin(x), expected)
    inner.close()
    assert type(mlp) is kind
    assert torch.equal(mlp(x), expected)
    outer.close()
    assert type(mlp) is MLP


SCRIPT = """
import torch.nn.functional as F
from torch import nn

class FromAScript(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))
"""


@pytest.mark.parametrize("lost", ["", SCRIPT.replace("gelu", "silu")], ids=["gone", "other"])
def test_a_pickle_needs_no_source(lost, tmp_path, monkeypatch):
    """cloudpickle takes the class along, but not the file that it is from."""
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    script = types.ModuleType("script_of_a_test")
    monkeypatch.setitem(sys.modules, script.__name__, script)
    vars(script)["__file__"] = str(path)
    exec(compile(SCRIPT, str(path), "exec"), vars(script))
    model, _ = convert(script.FromAScript)
    stored = pickle.dumps(model)
    path.write_text(lost)
    linecache.clearcache()
    monkeypatch.setattr("grkan.convert.calls._classes", {})
    with pytest.raises(ValueError, match="source of forward"):
        check(script.FromAScript, CallRecipe("forward", "F.gelu(self.fc1(x))", "self.fc1(x)", 0))
    twin = pickle.loads(stored)
    assert type(twin[1]) is not type(model[1])
    assert torch.equal(twin(data()), model(data()))
    assert torch.equal(copy.deepcopy(pickle.loads(pickle.dumps(twin)))(data()), model(data()))


def test_dill_keeps_the_changed_calls(monkeypatch):
    dill = pytest.importorskip("dill")
    model, _ = convert(MLP)
    monkeypatch.setattr(MLP, "__module__", "__main__")
    monkeypatch.setattr(sys.modules["__main__"], "MLP", MLP, raising=False)
    mlp = model[1]
    assert torch.equal(dill.loads(dill.dumps(mlp))(data()), mlp(data()))
