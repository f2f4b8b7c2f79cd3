"""RationalLinear."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.overrides import TorchFunctionMode

from grkan.nn import GRKAN, GroupRational, RationalLinear, variance_gain
from grkan.nn import linear as module_under_test


def by_hand(layer, x):
    return layer.linear(layer.act(x))


def randomised(layer):
    with torch.no_grad():
        for p in layer.act.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return layer


def of_conv1d(inputs=16, outputs=8):
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D(outputs, inputs)
    nn.init.normal_(conv1d.bias)
    return RationalLinear.around(GroupRational(8, "gelu"), conv1d)


KINDS = [lambda: RationalLinear(16, 8), lambda: RationalLinear(16, 8, bias=False, init="gelu"), of_conv1d]


@pytest.fixture
def fused(monkeypatch):
    """How often the fused operation ran."""
    calls = []
    original = module_under_test.rational_linear_of_vectors

    def spy(x, *args, **kwargs):
        calls.append(x.shape)
        return original(x, *args, **kwargs)

    monkeypatch.setattr(module_under_test, "rational_linear_of_vectors", spy)
    return calls


@pytest.mark.parametrize("make", KINDS)
def test_it_is_the_function_and_then_the_linear_layer(make, fused):
    layer = randomised(make())
    assert [name for name, _ in layer.named_children()] == ["act", "linear"]
    assert not isinstance(layer, nn.Linear)
    x = torch.randn(2, 3, 16, requires_grad=True)
    y = layer(x)
    assert len(fused) == 1
    torch.testing.assert_close(y, by_hand(layer, x))
    parameters = [x, *layer.parameters()]
    dy = torch.randn_like(y)
    for got, expected in zip(
        torch.autograd.grad(y, parameters, dy), torch.autograd.grad(by_hand(layer, x), parameters, dy), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_arguments():
    layer = RationalLinear(16, 5, False, 4, "gelu", (3, 2), "sum_of_abs", True)
    assert (layer.act.num_groups, layer.act.order, layer.act.form) == (4, (3, 2), "sum_of_abs")
    assert layer.act.share_numerator
    assert type(layer.linear) is nn.Linear
    assert set(RationalLinear(16, 5).state_dict()) == {
        "act.numerator", "act.denominator", "act._extra_state", "linear.weight", "linear.bias",
    }  # fmt: skip


@pytest.mark.parametrize("make", KINDS)
def test_it_can_be_read_and_set_as_a_linear_layer(make):
    layer = make()
    assert layer.weight is layer.linear.weight
    assert layer.bias is layer.linear.bias
    assert (layer.in_features, layer.out_features) == (16, 8)
    weight, bias = nn.Parameter(torch.ones(layer.weight.shape)), nn.Parameter(torch.ones(8))
    layer.weight, layer.bias = weight, bias
    assert layer.linear.weight is weight
    assert layer.linear.bias is bias
    assert {name for name, _ in layer.named_parameters()} >= {"linear.weight", "linear.bias"}
    layer.bias = None
    assert layer.linear.bias is None
    layer.weight.data = torch.zeros(layer.weight.shape)
    assert not layer(torch.randn(2, 16)).any()


def test_sizes_can_be_set():
    layer = RationalLinear(16, 8)
    layer.out_features = 4
    assert layer.linear.out_features == 4


def with_hook(layer):
    layer.linear.register_forward_hook(lambda module, inputs, output: output + 1)


def with_hook_on_the_function(layer):
    layer.act.register_forward_hook(lambda module, inputs, output: output + 1)


def with_another_function(layer):
    layer.act = nn.Tanh()


def with_subclass(layer):
    class Zero(GroupRational):
        def forward(self, x):
            return 0 * x

    layer.act = Zero(8)


def with_offloading(layer):
    forward = layer.act.forward
    layer.act.forward = lambda x: forward(x) * 2


def with_weight_norm(layer):
    parametrizations.weight_norm(layer.linear)
    with torch.no_grad():
        layer.linear.parametrizations.weight.original0.mul_(2)


def with_parametrised_coefficients(layer):
    class Halved(nn.Module):
        def forward(self, t):
            return t / 2

    parametrize.register_parametrization(layer.act, "numerator", Halved())


def with_pruning(layer):
    prune.l1_unstructured(layer.linear, "weight", 0.5)


def with_adapter(layer):
    """As PEFT's: it has the base layer and adds a product of its input."""

    class Adapter(nn.Module):
        def __init__(self, base_layer):
            super().__init__()
            self.base_layer, self.product = base_layer, nn.Linear(16, 8)

        def forward(self, x):
            return self.base_layer(x) + self.product(x)

    layer.linear = Adapter(layer.linear)


@pytest.mark.parametrize(
    "change",
    [
        with_hook,
        with_hook_on_the_function,
        with_another_function,
        with_subclass,
        with_offloading,
        with_weight_norm,
        with_parametrised_coefficients,
        with_pruning,
        with_adapter,
    ],
)
def test_what_others_do_to_a_child_takes_effect(change):
    layer, x = RationalLinear(16, 8), torch.randn(4, 16)
    before = layer(x)
    change(layer)
    torch.testing.assert_close(layer(x), by_hand(layer, x))
    assert not torch.allclose(before, layer(x))


@pytest.mark.parametrize("make", KINDS)
def test_the_state_dict_of_a_linear_layer_loads(make):
    layer = nn.Sequential(make())
    plain = {f"0.{name}": torch.randn_like(p) for name, p in layer[0].linear.named_parameters()}
    missing, unexpected = layer.load_state_dict(plain, strict=False)
    assert set(missing) == {"0.act.numerator", "0.act.denominator"}
    assert unexpected == []
    for name, p in layer[0].linear.named_parameters():
        assert torch.equal(p, plain[f"0.{name}"])
    with pytest.raises(RuntimeError, match="Missing key") as error:
        layer.load_state_dict(plain)
    assert "_extra_state" not in str(error.value)
    assert "Unexpected" not in str(error.value)
    coefficients = {k: v for k, v in layer.state_dict().items() if ".act." in k}
    assert layer.load_state_dict({**plain, **coefficients}) == ([], [])  # strict
    assert make().load_state_dict({k[2:]: v for k, v in {**plain, **coefficients}.items()}) == ([], [])
    both = {**layer.state_dict(), "0.weight": plain["0.weight"]}
    assert layer.load_state_dict(both, strict=False).unexpected_keys == ["0.weight"]


def test_another_form_is_refused():
    with pytest.raises(RuntimeError, match=r"act.numerator: the coefficients are for form sum_of_abs"):
        RationalLinear(16, 8).load_state_dict(RationalLinear(16, 8, form="sum_of_abs").state_dict())


def test_start():
    layer = RationalLinear(512, 512, init="gelu")
    gain = variance_gain(layer.act)
    assert (layer.weight.var() * 512).item() == pytest.approx(gain, rel=0.02)  # standard error 0.003
    assert not layer.bias.any()
    assert 0.9 < layer(torch.randn(512, 512)).square().mean() < 1.1


def through_a_file(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("order", ["parents first", "children first", "the linear layer alone", "init_weights"])
@pytest.mark.parametrize(
    "copied", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), through_a_file]
)
@pytest.mark.parametrize("make", [lambda: RationalLinear(256, 256), lambda: of_conv1d(256, 128)])
def test_whoever_initialises_in_whatever_order(make, order, copied):
    torch.manual_seed(0)
    original = make()
    layer, before = copied(original), copy.deepcopy(original.state_dict())
    if order != "the linear layer alone":
        with torch.no_grad():
            for p in layer.parameters():
                p.fill_(torch.nan)
    modules = list(layer.modules())
    for module in {"parents first": modules, "children first": modules[::-1]}.get(order, [layer.linear]):
        module.reset_parameters()
    if order == "init_weights":
        layer.init_weights()
    assert 0.8 < layer(torch.randn(1024, 256)).square().mean() < 1.25
    if layer is not original:
        assert all(torch.equal(t, before[name]) for name, t in original.state_dict().items())


def test_meta_and_dtype():
    layer = RationalLinear(16, 8, device="meta", dtype=torch.bfloat16)
    assert layer.weight.dtype == torch.bfloat16
    assert layer.act.numerator.dtype == torch.float32
    layer.to_empty(device="cpu").reset_parameters()
    assert layer(torch.randn(2, 16, dtype=torch.bfloat16)).isfinite().all()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_torchscript():
    layer, x = randomised(RationalLinear(16, 8)), torch.randn(3, 16)
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(layer), file)
    file.seek(0)
    loaded = torch.jit.load(file)
    torch.testing.assert_close(loaded(x), layer(x))
    actual = torch.autograd.grad(loaded(x).square().sum(), list(loaded.parameters()))
    torch.testing.assert_close(actual, torch.autograd.grad(layer(x).square().sum(), list(layer.parameters())))


def test_another_width_is_refused():
    layer = RationalLinear(16, 8)
    with pytest.raises(ValueError, match="x must have 16 channels"):
        layer(torch.randn(2, 8))


def test_errors():
    with pytest.raises(ValueError, match="in_features must be divisible by num_groups, 8; got 12"):
        RationalLinear(12, 4)
    with pytest.raises(ValueError, match="out_features must be at least 1; got 0"):
        RationalLinear(16, 0)
    with pytest.raises(TypeError, match="bias must be a bool; got 'ab'"):
        RationalLinear(16, 8, bias="ab")


@pytest.mark.parametrize("place", ["linear1", "linear2"])
@pytest.mark.parametrize("nested", [True, False])
def test_pytorchs_encoder_does_not_leave_the_function_out(place, nested):
    """Its fast path takes the weights of its children, and calls none of them."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, activation="gelu", batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested).eval()
    for part in encoder.layers:
        inputs, outputs = (16, 32) if place == "linear1" else (32, 16)
        setattr(part, place, RationalLinear(inputs, outputs, init="tanh"))
    x = torch.randn(3, 7, 16)
    mask = torch.zeros(3, 7, dtype=torch.bool)
    mask[0, 5:] = mask[1, 3:] = True
    expected = encoder(x, src_key_padding_mask=mask)  # with gradients there is no fast path
    with torch.no_grad():
        torch.testing.assert_close(encoder(x), encoder(x.clone().requires_grad_()), rtol=1e-4, atol=1e-5)
        y = encoder(x, src_key_padding_mask=mask)
    torch.testing.assert_close(y[~mask], expected[~mask], rtol=1e-4, atol=1e-5)


class Doubled(TorchFunctionMode):
    """Intercepts linear layers, as some quantisers do."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        y = func(*args, **(kwargs or {}))
        return 2 * y if func is torch.nn.functional.linear else y


@pytest.mark.parametrize("compiled", [False, True])
def test_modes_see_the_linear_layer(compiled):
    layer, x = RationalLinear(16, 8, bias=False), torch.randn(3, 16)
    called = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
    with Doubled():
        doubled = called(x)
    assert torch.allclose(doubled, 2 * layer(x))
    assert torch.allclose(called(x), layer(x))
    with torch.device("cpu"):
        y = called(x)
        assert torch.allclose(y, layer(x))
        assert compiled or type(y.grad_fn).__name__ == "_RationalLinearBackward"  # still fused


@pytest.mark.parametrize(
    ("owner", "name"), [(nn.Module, "__call__"), (nn.Module, "_call_impl"), (nn.Linear, "__call__")]
)
@pytest.mark.parametrize("make", [lambda: RationalLinear(16, 24), lambda: GRKAN(16, 24)])
def test_a_replaced_call_of_all_modules_sees_the_linear_layer(owner, name, make, monkeypatch):
    layer, original, seen = make(), getattr(owner, name), []

    def call(self, *args, **kwargs):
        seen.append(type(self))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(owner, name, call, raising=False)
    layer(torch.randn(2, 16))
    assert seen.count(nn.Linear) == sum(isinstance(module, nn.Linear) for module in layer.modules())


def test_a_function_is_not_shared_by_layers_of_different_widths():
    act = GroupRational(4, "gelu")
    layers = [RationalLinear.around(act, nn.Linear(16, out)) for out in (8, 12)]
    with pytest.raises(ValueError, match=r"act must be a function for the 8 inputs .* with 16 channels"):
        RationalLinear.around(act, nn.Linear(8, 16))
    assert [layer(torch.randn(2, 16)).shape[1] for layer in layers] == [8, 12]


def test_pytorchs_attention_refuses_it():
    attention = nn.MultiheadAttention(16, 2)
    before = attention.out_proj
    with pytest.raises(TypeError, match=r"out_proj of nn\.MultiheadAttention must stay a linear layer"):
        attention.out_proj = RationalLinear(16, 16)
    assert attention.out_proj is before

    class Calling(nn.MultiheadAttention):
        def forward(self, x):
            return self.out_proj(x)

    own = Calling(16, 2)
    own.out_proj = RationalLinear(16, 16)
    x = torch.randn(3, 16)
    assert torch.equal(own(x), own.out_proj(x))
