"""GRKAN: structure, start, and the paths through it."""

import copy
import functools
import gc
import io
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from grkan.nn import GRKAN, GroupRational, RationalLinear, variance_gain
from grkan.nn import linear as module_with_the_fused_path


def by_hand(layer, x):
    """The definition, from the children's own forward methods."""
    for child in (layer.act1, layer.fc1, layer.act2, layer.drop1, layer.norm, layer.fc2, layer.drop2):
        x = child(x)
    return x


def through_pickle(layer):
    return pickle.loads(pickle.dumps(layer))


def through_a_file(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def randomise(layer):
    """Coefficients that tell act1 from act2, and one group from the other."""
    with torch.no_grad():
        for act in (layer.act1, layer.act2):
            act.numerator.add_(torch.randn_like(act.numerator) * 0.1)
            act.denominator.add_(torch.randn_like(act.denominator) * 0.1)
    return layer


@pytest.fixture
def fused(monkeypatch):
    """How often the fused operation ran."""
    calls = []
    original = module_with_the_fused_path.rational_linear_of_vectors

    def spy(x, *args, **kwargs):
        calls.append(x.shape)
        return original(x, *args, **kwargs)

    monkeypatch.setattr(module_with_the_fused_path, "rational_linear_of_vectors", spy)
    return calls


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"hidden_features": 32, "out_features": 5},
        {"bias": False, "share_numerator": True},
        {"bias": (True, False), "form": "sum_of_abs"},
        {"norm_layer": nn.LayerNorm, "order": (7, 6)},
        {"num_groups": 1, "act_layer": nn.GELU},
    ],
)
def test_forward(arguments):
    layer = randomise(GRKAN(16, **arguments))
    x = torch.randn(2, 3, 16)
    y = layer(x)
    assert y.shape == (2, 3, arguments.get("out_features", 16))
    torch.testing.assert_close(y, by_hand(layer, x))


def test_structure():
    layer = GRKAN(16, 32, 5, bias=(True, False))
    assert [name for name, _ in layer.named_children()] == ["act1", "fc1", "act2", "drop1", "norm", "fc2", "drop2"]
    assert (layer.fc1.in_features, layer.fc1.out_features, layer.fc1.bias is None) == (16, 32, False)
    assert (layer.fc2.in_features, layer.fc2.out_features, layer.fc2.bias is None) == (32, 5, True)
    assert (layer.act1.init_name, layer.act2.init_name) == ("identity", "swish")


def test_convolutions_are_the_linear_layer_on_channels_first():
    conv, linear = GRKAN(16, 32, 8, use_conv=True), GRKAN(16, 32, 8)
    linear.load_state_dict({k: v.flatten(1) if v.dim() == 4 else v for k, v in conv.state_dict().items()})
    x = torch.randn(2, 16, 3, 5)
    y = linear(x.movedim(1, -1)).movedim(-1, 1)
    torch.testing.assert_close(conv(x), y)
    torch.testing.assert_close(conv(x.contiguous(memory_format=torch.channels_last)), y)


def test_dropout_is_between_the_function_and_the_linear_layer():
    layer = GRKAN(16, 64, drop=(0.5, 0.0))
    seen = []
    layer.fc2.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    layer(torch.randn(50, 16))
    assert (seen[0] == 0).float().mean().item() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(("drop", "training", "pairs"), [(0.0, True, 2), (0.5, False, 2), (0.5, True, 1)])
def test_fused_unless_dropout_acts(fused, drop, training, pairs):
    layer = GRKAN(16, drop=drop).train(training)
    layer(torch.randn(2, 16))
    assert len(fused) == pairs


class Doubling(nn.Module):
    def forward(self, x):
        return 2 * x


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def with_hook(layer, x):
    layer.fc1.register_forward_hook(lambda module, inputs, output: output + 1)
    return by_hand(layer, x)


def with_pre_hook_on_the_function(layer, x):
    layer.act1.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))
    return by_hand(layer, x)


def with_hook_on_dropout(layer, x):
    layer.drop1.register_forward_hook(lambda module, inputs, output: output * 3)
    return by_hand(layer, x)


def with_subclass(layer, x):
    linear = Doubled(16, 16)
    linear.load_state_dict(layer.fc1.state_dict())
    layer.fc1 = linear
    return by_hand(layer, x)


def with_parametrisation(layer, x):
    parametrizations.weight_norm(layer.fc2)
    with torch.no_grad():
        layer.fc2.parametrizations.weight.original0.mul_(2)
    return by_hand(layer, x)


def with_pruning(layer, x):
    prune.l1_unstructured(layer.fc2, "weight", 0.5)
    return by_hand(layer, x)


def with_backward_hook(layer, x):
    layer.fc1.register_full_backward_hook(lambda module, grads, outputs: None)
    layer.fc1.register_forward_hook(lambda module, inputs, output: output * 2)
    return by_hand(layer, x)


def with_parametrised_coefficients(layer, x):
    parametrize.register_parametrization(layer.act2, "numerator", Doubling())
    return by_hand(layer, x)


def with_another_function(layer, x):
    layer.act2 = nn.Tanh()
    return by_hand(layer, x)


def with_patched_forward(layer, x):
    layer.fc2.forward = lambda x: -F.linear(x, layer.fc2.weight, layer.fc2.bias)
    return by_hand(layer, x)


@pytest.mark.parametrize(
    "change",
    [
        with_hook,
        with_pre_hook_on_the_function,
        with_hook_on_dropout,
        with_subclass,
        with_parametrisation,
        with_pruning,
        with_patched_forward,
        with_backward_hook,
        with_parametrised_coefficients,
        with_another_function,
    ],
)
def test_what_others_do_to_a_child_takes_effect(change):
    layer = GRKAN(16)
    x = torch.randn(4, 16)
    before = layer(x)
    expected = change(layer, x)
    torch.testing.assert_close(layer(x), expected)
    assert not torch.allclose(before, expected)


def test_a_hook_for_all_modules_sees_the_children():
    layer, seen = GRKAN(16), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, inputs, output: seen.append(module))
    try:
        layer(torch.randn(2, 16))
    finally:
        handle.remove()
    assert seen == [layer.act1, layer.fc1, layer.act2, layer.drop1, layer.norm, layer.fc2, layer.drop2, layer]


def test_a_quantised_weight_multiplies_itself(fused):
    """A tensor that has a multiplication of its own, as torchao's."""

    class Quantised(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            result = super().__torch_function__(function, types, args, kwargs)
            return result.as_subclass(torch.Tensor) * 3 if function is F.linear else result

    layer = GRKAN(16)
    layer.fc1.weight = nn.Parameter(torch.randn(16, 16).as_subclass(Quantised))
    x = torch.randn(2, 16)
    torch.testing.assert_close(layer(x), by_hand(layer, x))
    assert len(fused) == 1  # fc2 alone


@pytest.mark.parametrize("child", ["fc1", "fc2"])
def test_another_width_is_refused(child):
    """What tensor parallelism without a plan for the functions would do: half of the channels, all of the groups."""
    layer = GRKAN(16, 32)
    layer.fc1 = nn.Linear(16, 16)
    layer.fc2 = nn.Linear(16, 16)
    if child == "fc1":
        layer.fc2.register_forward_pre_hook(lambda module, inputs: None)
    with pytest.raises(ValueError, match=r"x must have 32 channels in dimension -1, .* got shape \(3, 16\)"):
        layer(torch.randn(3, 16))


@pytest.mark.parametrize("width", [192, 768])
@pytest.mark.parametrize("act_init", [("identity", "swish"), ("gelu", "relu"), ("tanh", "squared_relu")])
def test_the_start_keeps_the_mean_square(width, act_init):
    torch.manual_seed(0)
    layer = GRKAN(width, 4 * width, act_init=act_init)
    x = torch.randn(256, width)
    seen = {}
    layer.fc1.register_forward_hook(lambda _, inputs, output: seen.update(fc1=output))
    y = layer(x)
    assert 0.9 < seen["fc1"].square().mean() < 1.1
    assert 0.8 < y.square().mean() < 1.25


@pytest.mark.parametrize("arguments", [{"norm_layer": nn.LayerNorm}, {"share_numerator": True}])
def test_the_start_of_variants(arguments):
    torch.manual_seed(0)
    layer = GRKAN(256, 512, **arguments)
    assert 0.8 < layer(torch.randn(256, 256)).square().mean() < 1.25


def test_convolutions_start_the_same_way():
    torch.manual_seed(0)
    layer = GRKAN(256, 512, use_conv=True)
    assert 0.8 < layer(torch.randn(16, 256, 4, 4)).square().mean() < 1.25


def test_weights_have_the_standard_deviation_of_the_formula():
    layer = GRKAN(256, 1024, act_init=("gelu", "swish"))
    for act, fc in ((layer.act1, layer.fc1), (layer.act2, layer.fc2)):
        expected = (variance_gain(act) / fc.in_features) ** 0.5
        assert fc.weight.std().item() == pytest.approx(expected, rel=0.01)  # 2^18 weights: standard error 0.0014
        assert not fc.bias.any()
    released = GRKAN(256, 1024, weight_init="trunc_normal")
    assert released.fc1.weight.std().item() == pytest.approx(0.02, rel=0.01)
    assert released.fc2.weight.std().item() == pytest.approx(0.02, rel=0.01)


@pytest.mark.parametrize("reset", ["init_weights", "reset_parameters"])
def test_initialising_again_covers_everything(reset):
    with torch.device("meta"):
        layer = GRKAN(256, 512, norm_layer=nn.LayerNorm)
    layer.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(torch.nan)
    getattr(layer, reset)()
    assert all(parameter.isfinite().all() for parameter in layer.parameters())
    assert layer.norm.weight.eq(1).all()
    assert torch.equal(layer.act2.numerator, GRKAN(8).act2.numerator)
    assert 0.8 < layer(torch.randn(256, 256)).square().mean() < 1.25


def reset_in_order(layer):
    for module in layer.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()


def reset_children_first(layer):
    layer.apply(lambda module: module.reset_parameters() if hasattr(module, "reset_parameters") else None)


def as_transformers_does(layer):
    for module in layer.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
    layer.init_weights()


def linear_layers_alone(layer):
    layer.fc2.reset_parameters()
    layer.fc1.reset_parameters()


def deferred(layer):
    layer.to("meta").to_empty(device="cpu")
    reset_in_order(layer)


STARTS = [reset_in_order, reset_children_first, as_transformers_does, linear_layers_alone, deferred]


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("copied", [lambda m: m, copy.deepcopy, through_pickle, through_a_file])
def test_whoever_initialises_in_whatever_order(start, copied):
    torch.manual_seed(0)
    original = GRKAN(192, 768)
    layer, before = copied(original), copy.deepcopy(original.state_dict())
    start(layer)
    y = layer(torch.randn(1024, 192))
    assert 0.8 < y.square().mean() < 1.25
    assert not torch.equal(layer.fc1.weight, before["fc1.weight"])
    if layer is not original:  # which stays as it was: its copy has functions of its own
        assert all(torch.equal(t, before[name]) for name, t in original.state_dict().items())


def test_the_linear_layers_are_plain():
    layer = GRKAN(16)
    assert type(layer.fc1) is type(layer.fc2) is nn.Linear


def test_the_start_of_a_norm_and_of_the_released_code():
    torch.manual_seed(0)
    layer = GRKAN(256, 512, norm_layer=nn.LayerNorm)
    reset_in_order(layer)
    assert layer.fc2.weight.std().item() == pytest.approx(512**-0.5, rel=0.01)
    layer = GRKAN(256, 512, weight_init="trunc_normal")
    reset_in_order(layer)
    assert layer.fc2.weight.std().item() == pytest.approx(0.02, rel=0.01)


def test_another_function_has_another_gain():
    torch.manual_seed(0)
    layer = GRKAN(256, 1024)
    layer.act2 = nn.ReLU()
    layer.init_weights()
    assert layer.fc2.weight.std().item() == pytest.approx((2 / 1024) ** 0.5, rel=0.01)


def test_every_coefficient_learns_from_the_identity():
    torch.manual_seed(0)
    layer = GRKAN(16, 32, act_init=("identity", "identity"))
    x = torch.randn(256, 16)
    target = torch.sin(2 * x)
    start = copy.deepcopy(layer.state_dict())
    optimiser = torch.optim.AdamW(layer.parameters(), lr=1e-2, weight_decay=0.0)
    losses = []
    for _ in range(30):
        loss = F.mse_loss(layer(x), target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    for name in ("act1.denominator", "act2.denominator", "act1.numerator", "act2.numerator"):
        assert (layer.state_dict()[name] != start[name]).all(), name
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types(dtype):
    layer = GRKAN(16, 32, dtype=dtype)
    assert layer.fc1.weight.dtype == dtype
    assert layer.act1.numerator.dtype == torch.float32
    x = torch.randn(4, 16).to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    exact = copy.deepcopy(layer).float()
    torch.testing.assert_close(y.float(), exact(x.float()), rtol=0.05, atol=0.05)
    y.sum().backward()
    assert layer.act2.denominator.grad.dtype == torch.float32


def test_autocast_is_what_the_modules_do_under_autocast():
    layer = randomise(GRKAN(16, 32))
    x = torch.randn(4, 16)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.05)


def test_compiles_without_a_break():
    layer = randomise(GRKAN(16, 32))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(4, 16)
    torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"in_features": 12}, ValueError, "in_features must be divisible by num_groups, 8; got 12"),
        ({"in_features": 0}, ValueError, "in_features must be at least 1; got 0"),
        ({"in_features": 8.0}, TypeError, "in_features must be an int; got 8.0"),
        ({"in_features": "a"}, TypeError, "in_features must be an int; got 'a'"),
        ({"hidden_features": 20}, ValueError, "hidden_features must be divisible by num_groups, 8; got 20"),
        ({"hidden_features": 0}, ValueError, "hidden_features must be at least 1; got 0"),
        ({"out_features": 0}, ValueError, "out_features must be at least 1; got 0"),
        ({"act_init": "swish"}, ValueError, "act_init must be a pair"),
        ({"act_init": ("identity", "swich")}, ValueError, "act_init must be one of .* got 'swich'"),
        ({"bias": (True, True, False)}, ValueError, "bias must be one value or a pair"),
        ({"bias": "ab"}, TypeError, "bias must be a bool; got 'ab'"),
        ({"drop": "a"}, TypeError, "drop must be a number; got 'a'"),
        ({"drop": (0.0, 1.5)}, ValueError, r"drop must lie in \[0, 1\]; got 1.5"),
        ({"use_conv": "no"}, TypeError, "use_conv must be a bool; got 'no'"),
        ({"weight_init": "xavier"}, ValueError, "weight_init must be .* got 'xavier'"),
        ({"weight_init": 3}, TypeError, "weight_init must be .* got 3"),
        ({"form": "A"}, ValueError, "form must be"),
        ({"norm_layer": 3}, TypeError, "norm_layer must return a module .* got 3"),
        ({"norm_layer": lambda width: width}, TypeError, "norm_layer must return a module"),
    ],
)
def test_errors(arguments, error, match):
    with pytest.raises(error, match=match):
        GRKAN(**{"in_features": 16, **arguments})


@pytest.mark.parametrize(
    "norm_layer",
    [
        nn.LayerNorm,
        functools.partial(nn.LayerNorm, eps=1e-6),
        lambda width: nn.LayerNorm(width),
        lambda width, eps=1e-6: nn.Sequential(nn.LayerNorm(width, eps), nn.Identity()),
    ],
)
def test_norms_with_and_without_a_device(norm_layer):
    layer = GRKAN(16, 32, norm_layer=norm_layer, device="meta", dtype=torch.float64)
    assert all(p.is_meta and p.dtype == torch.float64 for p in layer.norm.parameters())
    layer.to_empty(device="cpu").init_weights()
    normed = layer.norm(layer.act2(layer.fc1(torch.randn(4, 16, dtype=torch.float64))))
    torch.testing.assert_close(normed.mean(-1), torch.zeros(4, dtype=torch.float64))


def test_timms_norm():
    timm = pytest.importorskip("timm")
    layer = GRKAN(16, 32, norm_layer=timm.layers.LayerNorm, dtype=torch.bfloat16)
    assert layer.norm.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("make", [lambda: GRKAN(8, 16), lambda: nn.Sequential(RationalLinear(8, 4), GroupRational(2))])
def test_a_deleted_layer_frees_its_memory(make):
    """At once: with a reference cycle it would wait for Python's garbage collector, which knows nothing of GPUs."""
    layer = make()
    parameters = [weakref.ref(p) for p in layer.parameters()]
    gc.collect()
    gc.disable()
    try:
        del layer
        assert not any(parameter() is not None for parameter in parameters)
    finally:
        gc.enable()


def test_a_replaced_forward_of_all_linear_layers_counts(monkeypatch):
    layer, x, linear = GRKAN(8, 16), torch.randn(3, 8), nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: 2.0 * linear(self, x))
    torch.testing.assert_close(layer(x), by_hand(layer, x))


def test_a_replaced_linear_function_has_its_own_gradient(monkeypatch):
    layer, x, linear = GRKAN(8, 16), torch.randn(3, 8, requires_grad=True), F.linear
    monkeypatch.setattr(F, "linear", lambda x, weight, bias=None: 2.0 * linear(x, weight, bias))
    (dx,) = torch.autograd.grad(layer(x).sum(), x)
    torch.testing.assert_close(dx, torch.autograd.grad(by_hand(layer, x).sum(), x)[0])


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.9, 0.1), (0.3, 0.7)])
def test_averages_of_state_dicts_load(weights):
    """As model soups and federated learning make them, entry by entry."""
    layers = [GRKAN(8, 16) for _ in weights]
    for layer in layers:
        randomise(layer)
    states = [layer.state_dict() for layer in layers]
    total = sum(weights)
    mean = {key: sum(w * state[key] for w, state in zip(weights, states, strict=True)) / total for key in states[0]}
    if total == len(weights):
        mean = {key: sum(state[key] for state in states) / len(states) for key in states[0]}
    layers[0].load_state_dict(mean)
    torch.testing.assert_close(layers[0].act1.numerator.detach(), mean["act1.numerator"])


def test_loading_with_swapped_parameters():
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        layer, other = GRKAN(8, 16), GRKAN(8, 16)
        randomise(other)
        layer.load_state_dict(other.state_dict())
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
    assert torch.equal(layer.act1.numerator, other.act1.numerator)


@pytest.mark.parametrize(("training", "drop"), [(False, 0.9), (True, 0.0)])
def test_a_traced_graph_keeps_all_children(training, drop):
    layer = GRKAN(8, 16, 8, drop=(drop, 0.0)).train(training)
    graph, x = torch.fx.symbolic_trace(layer), torch.randn(64, 8)
    called = [node.target for node in graph.graph.nodes if node.op == "call_module"]
    assert called == ["fc1", "drop1", "norm", "fc2", "drop2"]
    torch.testing.assert_close(graph(x), layer(x))
    if drop:
        assert not torch.equal(graph.train()(x), layer(x))


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_layer_keeps_its_dropouts(strict):
    layer, x = GRKAN(8, 16, 8, drop=0.5).eval(), torch.randn(2, 8)
    program = torch.export.export(layer, (x,), strict=strict)
    assert sum(node.target is torch.ops.aten.dropout.default for node in program.graph.nodes) == 2
    torch.testing.assert_close(program.module()(x), layer(x))


@pytest.mark.parametrize("training", [False, True])
def test_a_compiled_layer_is_fused_as_in_eager_mode(training):
    operators = []

    def backend(graph, _):
        operators.extend(node.target for node in graph.graph.nodes)
        return graph

    torch.compile(GRKAN(8, 16, 8, drop=0.5).train(training), fullgraph=True, backend=backend)(torch.randn(2, 8))
    assert operators.count(torch.ops.grkan.rational_linear) == (1 if training else 2)
