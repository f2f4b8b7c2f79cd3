"""The door: one grid that every backend passes, and everything that PyTorch can do with a function."""

import io
import itertools
import warnings
from typing import ClassVar

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import grkan
from grkan.rational import dispatch, op
from grkan.rational.reference import FORMS, rational

# What the grid runs on: the operators and autograd functions around the definition, plain operations, and the kernel,
# where there is one.
BACKENDS = ["no kernel", "reference", "native"]

TOLERANCE = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.float32: {"rtol": 2e-5, "atol": 2e-5},
    torch.bfloat16: {"rtol": 2**-7, "atol": 2**-7},
    torch.float16: {"rtol": 2**-10, "atol": 2**-10},
}


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    name = request.param
    if name == "no kernel":
        monkeypatch.setattr(dispatch, "KERNELS", {})
        monkeypatch.setattr(dispatch, "_noticed", {"cpu"})
        name = "auto"
    elif name == "native" and "cpu" not in dispatch.KERNELS:
        pytest.skip("the CPU kernel is not built")
    with grkan.set_backend(name):
        yield request.param


def coefficients(groups, order, share="none", dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows_a = 1 if share == "numerator" else groups
    rows_b = 1 if share == "denominator" else groups
    a = torch.randn(rows_a, order[0] + 1, generator=generator, dtype=torch.float64)
    b = torch.randn(rows_b, order[1], generator=generator, dtype=torch.float64)
    return a.to(dtype).requires_grad_(), b.to(dtype).requires_grad_()


def expected(x, a, b, form, channel_dim, weight):
    """F and its gradients in float64, by autograd of the definition; the oracle of the grid."""
    x, a, b = (t.detach().double().requires_grad_() for t in (x, a, b))
    groups = max(a.shape[0], b.shape[0])
    # chunk by chunk, so that it owes nothing to the layout code
    chunks = x.movedim(channel_dim, -1).chunk(groups, -1) if x.shape[channel_dim] else [x.movedim(channel_dim, -1)]
    outputs = []
    for k, chunk in enumerate(chunks):
        row_a, row_b = (t[k if t.shape[0] > 1 else 0][None] for t in (a, b))
        outputs.append(rational(chunk.unsqueeze(-2), row_a, row_b, form).squeeze(-2))
    y = torch.cat(outputs, -1).movedim(-1, channel_dim)
    gradients = torch.autograd.grad(y, (x, a, b), weight.double(), allow_unused=True, materialize_grads=True)
    return y, *gradients


def assert_agrees(x, a, b, form="abs_of_sum", channel_dim=-1, weight=None):
    """Values and gradients of the door against float64; x is a leaf or a view, and stays what it is."""
    x = x.detach().requires_grad_()
    y = grkan.group_rational(x, a, b, form=form, channel_dim=channel_dim)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    if x.numel():  # the strides of nothing mean nothing
        assert y.stride() == torch.empty_like(x).stride()
    weight = torch.randn_like(y) if weight is None else weight
    gradients = torch.autograd.grad(y, (x, a, b), weight, allow_unused=True, materialize_grads=True)
    wanted_y, wanted_dx, wanted_da, wanted_db = expected(x, a, b, form, channel_dim, weight)
    tolerance = TOLERANCE[x.dtype]
    torch.testing.assert_close(y.double(), wanted_y, **tolerance, equal_nan=True)
    torch.testing.assert_close(gradients[0].double(), wanted_dx, **tolerance)
    for actual, wanted, source in zip(gradients[1:], (wanted_da, wanted_db), (a, b), strict=True):
        assert (actual.shape, actual.dtype) == (source.shape, source.dtype)
        # A sum of N terms: its rounding error grows with the terms, so compare relative to the largest sum.
        scale = max(1.0, wanted.abs().max().item() if wanted.numel() else 1.0)
        torch.testing.assert_close(actual.double() / scale, wanted / scale, **TOLERANCE[min_dtype(x, source)])


def min_dtype(*tensors):
    return min((t.dtype for t in tensors), key=lambda d: torch.finfo(d).bits * 100 - torch.finfo(d).eps)


# The grid.

SIZES = [(1, 1, 1), (3, 1, 8), (5, 8, 1), (2, 3, 7), (197, 8, 24), (3, 2, 1023)]  # rows, groups, width
ORDERS = [(5, 4), (7, 6), (0, 0), (3, 2), (4, 5), (1, 0), (0, 2), (9, 8)]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("share", ["none", "numerator", "denominator"])
def test_grid_sizes(backend, size, form, dtype, share):
    rows, groups, width = size
    torch.manual_seed(1)
    assert_agrees(torch.randn(rows, groups * width, dtype=dtype), *coefficients(groups, (5, 4), share), form)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_grid_orders(backend, order, form, dtype):
    torch.manual_seed(2)
    assert_agrees(torch.randn(6, 12, dtype=dtype), *coefficients(4, order), form)


def layouts():
    """Name -> (x, channel_dim): 1-D to 5-D, every place of the channels, every way to lie in memory."""
    torch.manual_seed(3)
    return {
        "1-D": (torch.randn(12), -1),
        "2-D": (torch.randn(5, 12), 1),
        "3-D": (torch.randn(2, 5, 12), -1),
        "4-D channels first": (torch.randn(2, 12, 3, 5), 1),
        "4-D channels first, negative": (torch.randn(2, 12, 3, 5), -3),
        "4-D channels_last": (torch.randn(2, 12, 3, 5).to(memory_format=torch.channels_last), 1),
        "4-D channels_last, channels at the end": (torch.randn(2, 5, 3, 12).to(memory_format=torch.channels_last), -1),
        "5-D channels first": (torch.randn(2, 12, 3, 2, 5), 1),
        "5-D channels_last_3d": (torch.randn(2, 12, 3, 2, 5).to(memory_format=torch.channels_last_3d), 1),
        "channels at 0": (torch.randn(12, 5), 0),
        "transposed": (torch.randn(2, 12, 5).transpose(1, 2), -1),
        "transposed, channels inside": (torch.randn(2, 5, 12).transpose(1, 2), 1),
        "sliced rows": (torch.randn(10, 12)[::2], -1),
        "sliced channels": (torch.randn(5, 24)[:, ::2], -1),
        "offset": (torch.randn(5, 14)[:, 1:13], -1),
        "expanded rows": (torch.randn(1, 12).expand(5, 12), -1),
        "expanded channels": (torch.randn(5, 1).expand(5, 12), -1),
        "size-1 dimensions": (torch.randn(1, 12, 1, 1).to(memory_format=torch.channels_last), 1),
        "column of a matrix": (torch.randn(12, 4)[:, 1], 0),
        "empty batch": (torch.randn(0, 12), -1),
        "empty in the middle": (torch.randn(2, 0, 12), -1),
        "empty, channels first": (torch.randn(0, 12, 3, 3), 1),
    }


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", layouts())
def test_grid_layouts(backend, name, form):
    x, channel_dim = layouts()[name]
    assert_agrees(x, *coefficients(4, (5, 4)), form, channel_dim)


@pytest.mark.parametrize("name", ["3-D", "4-D channels first", "4-D channels_last", "transposed"])
def test_expanded_and_strided_gradients(backend, name):
    """`y.sum().backward()` sends a gradient of stride 0; it must not be read as if it were contiguous."""
    x, channel_dim = layouts()[name]
    a, b = coefficients(4, (5, 4))
    assert_agrees(x, a, b, channel_dim=channel_dim, weight=torch.ones(()).expand(x.shape))
    assert_agrees(
        x, a, b, channel_dim=channel_dim, weight=torch.randn(x.shape[::-1]).permute(*reversed(range(x.dim())))
    )
    leaf = x.detach().requires_grad_()
    grkan.group_rational(leaf, a, b, channel_dim=channel_dim).sum().backward()
    torch.testing.assert_close(
        leaf.grad.double(), expected(x, a, b, "abs_of_sum", channel_dim, torch.ones(x.shape))[1], rtol=1e-5, atol=1e-5
    )


def test_no_channels(backend):
    y = grkan.group_rational(torch.randn(3, 0), *coefficients(4, (5, 4)))
    assert y.shape == (3, 0)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("coefficient_dtype", TOLERANCE, ids=str)
def test_coefficients_of_any_dtype(backend, dtype, coefficient_dtype):
    """Their gradients have their dtype; arithmetic follows x."""
    torch.manual_seed(4)
    assert_agrees(torch.randn(3, 8, dtype=dtype), *coefficients(4, (5, 4), dtype=coefficient_dtype))


def test_half_types_compute_in_float32(backend):
    """In float16 arithmetic x^5 overflows at 10, and a sum of 10,000 ones stops at 2048."""
    a, b = coefficients(1, (5, 4))
    x = torch.full((10_000, 1), 30.0, dtype=torch.float16)
    y = grkan.group_rational(x, a, b)
    (da,) = torch.autograd.grad(y.sum(), a)
    wanted = expected(x, a, b, "abs_of_sum", -1, torch.ones_like(x))
    torch.testing.assert_close(y.double(), wanted[0], rtol=1e-3, atol=0)
    torch.testing.assert_close(da.double(), wanted[2], rtol=1e-3, atol=0)


def test_range_and_limits_through_the_door(backend):
    """The definition's care for the range reaches the user; its own test compares with exact arithmetic."""
    a = torch.tensor([[0.0, 1.0, 0.0, 0.0, 0.0, 0.0]], requires_grad=True)
    b = torch.zeros(1, 4, requires_grad=True)
    x = torch.tensor([[1e-30, -3e38, 3e38, torch.inf, -torch.inf, torch.nan]], requires_grad=True)
    y = grkan.group_rational(x, a, b)
    torch.testing.assert_close(y, x, rtol=0, atol=0, equal_nan=True)
    (dx,) = torch.autograd.grad(y[:, :-1].sum(), x)
    assert dx[0, :5].tolist() == [1.0] * 5


# Autograd, torch.func, forward mode.


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("order", [(5, 4), (0, 0), (2, 3), (4, 1)], ids=str)
def test_gradcheck_and_gradgradcheck(backend, form, order):
    torch.manual_seed(5)
    x = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    inputs = (x, *coefficients(3, order, dtype=torch.float64))
    if order[1] == 0:
        inputs = inputs[:2]

    def f(x, a, b=torch.empty(3, 0, dtype=torch.float64)):  # noqa: B008
        return grkan.group_rational(x, a, b, form=form)

    assert torch.autograd.gradcheck(f, inputs, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(f, inputs, check_batched_grad=True)


@pytest.mark.parametrize("channel_dim", [1, -1])
def test_gradcheck_of_other_layouts(backend, channel_dim):
    torch.manual_seed(5)
    x = torch.randn(2, 4, 3, 4, dtype=torch.float64).to(memory_format=torch.channels_last).requires_grad_()
    inputs = (x, *coefficients(2, (3, 2), "numerator", dtype=torch.float64))

    def f(*args):
        return grkan.group_rational(*args, channel_dim=channel_dim)

    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs)


def test_third_derivative(backend):
    x = torch.tensor([0.7], dtype=torch.float64, requires_grad=True)
    a, b = (t.detach() for t in coefficients(1, (5, 4), dtype=torch.float64))

    def derivatives(f):
        values, y = [], f(x)
        for _ in range(3):
            (y,) = torch.autograd.grad(y.sum(), x, create_graph=True)
            values.append(y.item())
        return values

    wanted = derivatives(lambda x: rational(x[None], a, b, "abs_of_sum"))
    assert derivatives(lambda x: grkan.group_rational(x, a, b)) == pytest.approx(wanted, rel=1e-10)


def definition(x, a, b, form):
    groups = max(a.shape[0], b.shape[0])
    return rational(x.unflatten(-1, (groups, -1)), a, b, form).flatten(-2)


TRANSFORMS = {
    "vmap": lambda f, x, a, b, t: vmap(f, (0, None, None))(x, a, b),
    "vmap over coefficients": lambda f, x, a, b, t: vmap(f, (None, 0, 0))(x, a + t[:, None, :1], b + t[:, None, :1]),
    "vmap, channels first": lambda f, x, a, b, t: vmap(f, (1, None, None))(
        x.T.reshape(x.shape[1], -1).contiguous(), a, b
    ),
    "grad": lambda f, x, a, b, t: grad(lambda *args: f(*args).square().sum(), (0, 1, 2))(x, a, b),
    "per-sample grad": lambda f, x, a, b, t: vmap(grad(lambda a, x: f(x, a, b).sum()), (None, 0))(a, x),
    "jvp": lambda f, x, a, b, t: jvp(f, (x, a, b), (t, a.cos(), b.cos())),
    "vjp": lambda f, x, a, b, t: vjp(f, x, a, b)[1](t),
    "jacrev": lambda f, x, a, b, t: jacrev(f, (0, 1, 2))(x, a, b),
    "jacfwd": lambda f, x, a, b, t: jacfwd(f, (0, 1, 2))(x, a, b),
    "hessian": lambda f, x, a, b, t: hessian(lambda *args: f(*args).sum(), (0, 1, 2))(x, a, b),
    "jacfwd of grad": lambda f, x, a, b, t: jacfwd(grad(lambda x: f(x, a, b).sum()))(x),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_torch_func_equals_the_definition(backend, name, form):
    torch.manual_seed(6)
    x, t = torch.randn(3, 8, dtype=torch.float64), torch.randn(3, 8, dtype=torch.float64)
    a, b = (c.detach() for c in coefficients(4, (5, 4), dtype=torch.float64))
    transform = TRANSFORMS[name]
    actual = transform(lambda x, a, b: grkan.group_rational(x, a, b, form=form), x, a, b, t)
    wanted = transform(lambda x, a, b: definition(x, a, b, form), x, a, b, t)
    torch.testing.assert_close(actual, wanted)


def test_forward_mode_equals_the_definition(backend):
    torch.manual_seed(6)
    x, t = torch.randn(3, 8, dtype=torch.float64), torch.randn(3, 8, dtype=torch.float64)
    a, b = (c.detach() for c in coefficients(4, (5, 4), dtype=torch.float64))
    tangents = []
    for f in (grkan.group_rational, lambda *args: definition(*args, "abs_of_sum")):
        with forward_ad.dual_level():
            duals = (forward_ad.make_dual(x, t), forward_ad.make_dual(a, a.cos()), forward_ad.make_dual(b, b.cos()))
            tangents.append(forward_ad.unpack_dual(f(*duals)).tangent)
    assert tangents[1].abs().min() > 0
    torch.testing.assert_close(*tangents)


def test_derivatives_of_a_backward_that_began_outside(backend):
    """The forward ran as an operator; its backward is then batched, or differentiated in forward mode."""
    torch.manual_seed(7)
    x = torch.randn(8, dtype=torch.float64, requires_grad=True)
    a, b = (c.detach() for c in coefficients(4, (5, 4), dtype=torch.float64))

    def f(x):
        return grkan.group_rational(x, a, b)

    wanted = jacrev(lambda x: definition(x, a, b, "abs_of_sum"))(x.detach())
    torch.testing.assert_close(torch.autograd.functional.jacobian(f, x, vectorize=True), wanted)
    y = f(x)
    with forward_ad.dual_level():
        direction = torch.randn(8, dtype=torch.float64)
        (dx,) = torch.autograd.grad(y, x, forward_ad.make_dual(torch.ones_like(y), direction))
        torch.testing.assert_close(forward_ad.unpack_dual(dx).tangent, direction @ wanted)


def test_functional_call_and_ensemble(backend):
    """One model, many coefficients: the torch.func recipe for ensembles."""
    layer = torch.nn.ParameterDict(dict(zip(("a", "b"), coefficients(4, (5, 4)), strict=True)))

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.c = layer

        def forward(self, x):
            return grkan.group_rational(x, self.c["a"], self.c["b"])

    model, x = Model(), torch.randn(3, 8)
    stacked = {name: torch.stack([p.detach(), 2 * p.detach()]) for name, p in model.named_parameters()}
    y = vmap(lambda p: functional_call(model, p, (x,)))(stacked)
    torch.testing.assert_close(y[0], model(x))


# torch.compile, export, the operator's own registration.


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["3-D", "4-D channels first", "4-D channels_last", "transposed", "expanded rows"])
def test_compile_fullgraph(backend, name, form):
    torch.compiler.reset()
    x, channel_dim = layouts()[name]
    a, b = coefficients(4, (5, 4))

    def f(x):
        return grkan.group_rational(x, a, b, form=form, channel_dim=channel_dim) * 2

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    torch.testing.assert_close(compiled(leaf), f(leaf))
    actual = torch.autograd.grad(compiled(leaf).square().sum(), (leaf, a, b))
    wanted = torch.autograd.grad(f(leaf).square().sum(), (leaf, a, b))
    torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)


def test_compile_inductor_without_recompiling_for_a_batch_size(backend):
    torch.compiler.reset()
    a, b = coefficients(4, (5, 4))

    @torch.compile(fullgraph=True, dynamic=True)
    def f(x):
        return grkan.group_rational(torch.sin(x), a, b).square()

    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (5, 2, 9):
            x = torch.randn(rows, 12, requires_grad=True)
            wanted = grkan.group_rational(torch.sin(x), a, b).square()
            torch.testing.assert_close(f(x), wanted)
            (dx,) = torch.autograd.grad(f(x).sum(), x)
            torch.testing.assert_close(dx, torch.autograd.grad(wanted.sum(), x)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["vmap", "grad", "jvp", "jacrev", "jacfwd"])
def test_compile_of_torch_func(backend, name):
    torch.compiler.reset()
    torch.manual_seed(6)
    x, t = torch.randn(3, 8), torch.randn(3, 8)
    a, b = (c.detach() for c in coefficients(4, (5, 4)))

    def f(x):
        return TRANSFORMS[name](grkan.group_rational, x, a, b, t)

    if name == "jacfwd" and torch.__version__ < (2, 11):
        pytest.skip("PyTorch 2.10 does not compile jacfwd of several tensors")
    actual = torch.compile(f, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(actual, f(x), rtol=1e-4, atol=1e-4)


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = (torch.nn.Parameter(c.detach()) for c in coefficients(4, (5, 4)))

    def forward(self, x):
        return grkan.group_rational(x, self.a, self.b, channel_dim=1)


def test_export(backend):
    layer, x = Layer(), torch.randn(2, 8, 3)
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: batch},))
    calls = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert ("grkan.group_rational.default" in calls) == (backend != "reference")
    x = torch.randn(5, 8, 3)
    torch.testing.assert_close(program.module()(x), layer(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", layouts())
def test_opcheck(name):
    x, channel_dim = layouts()[name]
    x = x.detach().requires_grad_()
    arguments = (x, *coefficients(4, (5, 4)), "abs_of_sum", channel_dim % x.dim())
    torch.library.opcheck(torch.ops.grkan.group_rational.default, arguments)
    grad_argument = torch.randn_like(x.detach())
    detached = tuple(t.detach() if isinstance(t, torch.Tensor) else t for t in arguments)
    torch.library.opcheck(torch.ops.grkan.group_rational_backward.default, (grad_argument, *detached))


def test_meta_device(backend):
    a, b = (c.detach().to("meta").requires_grad_() for c in coefficients(4, (5, 4)))
    x = torch.empty(2, 8, 3, device="meta", dtype=torch.bfloat16, requires_grad=True)
    y = grkan.group_rational(x, a, b, channel_dim=1)
    assert (y.shape, y.dtype, y.device.type) == (x.shape, x.dtype, "meta")
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert a.grad.shape == a.shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(backend, dtype):
    """F keeps the dtype of its input; rational_linear is autocast like F.linear."""
    a, b = coefficients(4, (5, 4))
    x, weight = torch.randn(3, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    plain = grkan.group_rational(x, a, b)
    with torch.autocast("cpu", dtype):
        assert grkan.group_rational(x, a, b).dtype == torch.float32
        torch.testing.assert_close(grkan.group_rational(x, a, b), plain)
        assert grkan.group_rational(x.to(dtype), a, b).dtype == dtype
        y = grkan.rational_linear(x, a, b, weight)
        wanted = torch.nn.functional.linear(grkan.group_rational(x.to(dtype), a, b), weight)
        assert grkan.rational_linear(x.double(), a, b, weight.double()).dtype == torch.float64
    assert y.dtype == dtype
    torch.testing.assert_close(y, wanted, rtol=0, atol=0)
    y.sum().backward()
    assert (x.grad.dtype, weight.grad.dtype, a.grad.dtype) == (torch.float32,) * 3


def linear_inputs(bias=True, dtype=torch.float64):
    """x, numerator, denominator, weight and perhaps bias, that require gradients."""
    torch.manual_seed(8)
    a, b = coefficients(4, (5, 4), dtype=dtype)
    tensors = [torch.randn(2, 3, 8, dtype=dtype), a, b, torch.randn(5, 8, dtype=dtype)]
    tensors += [torch.randn(5, dtype=dtype)] if bias else []
    return [t.detach().requires_grad_() for t in tensors]


def composed(x, a, b, weight, bias=None, form="abs_of_sum"):
    return torch.nn.functional.linear(definition(x, a, b, form), weight, bias)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bias", [True, False])
def test_rational_linear(backend, bias, form):
    inputs = linear_inputs(bias)

    def f(*inputs):
        return grkan.rational_linear(*inputs, form=form)

    torch.testing.assert_close(f(*inputs), composed(*inputs, form=form) if bias else composed(*inputs, None, form))
    assert torch.autograd.gradcheck(f, inputs, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(f, inputs, check_batched_grad=True)


@pytest.mark.parametrize("create_graph", [False, True])
def test_backward_of_rational_linear_under_autocast(backend, create_graph):
    """The forward was outside: its dtypes are those of the backward, as if nothing had changed."""
    inputs = linear_inputs(dtype=torch.float32)
    loss = grkan.rational_linear(*inputs).square().sum()
    wanted = torch.autograd.grad(loss, inputs, retain_graph=True, create_graph=create_graph)
    with torch.autocast("cpu", torch.bfloat16):
        actual = torch.autograd.grad(loss, inputs, create_graph=create_graph)
    if backend != "reference":  # whose linear layer is PyTorch's, which rounds
        torch.testing.assert_close(actual, wanted)
    assert [t.dtype for t in actual] == [torch.float32] * 5


@pytest.mark.parametrize("frozen", [(0,), (1, 2), (0, 1, 2), (3,), (4,), (3, 4), (0, 1, 2, 3)], ids=str)
def test_rational_linear_with_frozen_inputs(backend, frozen):
    inputs = [t.detach().requires_grad_(i not in frozen) for i, t in enumerate(linear_inputs())]
    learned = [t for t in inputs if t.requires_grad]
    actual = torch.autograd.grad(grkan.rational_linear(*inputs).square().sum(), learned)
    torch.testing.assert_close(actual, torch.autograd.grad(composed(*inputs).square().sum(), learned))


@pytest.mark.parametrize("shape", [(8,), (0, 8), (2, 0, 8), (3, 8), (2, 2, 3, 8)], ids=str)
def test_rational_linear_of_any_shape(backend, shape):
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True), *linear_inputs()[1:]]
    y = grkan.rational_linear(*inputs)
    torch.testing.assert_close(y, composed(*inputs))
    torch.testing.assert_close(
        torch.autograd.grad(y.sum(), inputs), torch.autograd.grad(composed(*inputs).sum(), inputs)
    )


def test_rational_linear_of_strided_tensors(backend):
    x, *rest = linear_inputs()
    for view in (x.detach().transpose(0, 1), x.detach()[:, ::2], x.detach()[:1].expand(4, -1, -1)):
        inputs = [view.requires_grad_(), *rest]
        weight = torch.randn(5, dtype=torch.float64).expand(*view.shape[:-1], 5)
        actual = torch.autograd.grad(grkan.rational_linear(*inputs), inputs, weight)
        torch.testing.assert_close(actual, torch.autograd.grad(composed(*inputs), inputs, weight))


def test_rational_linear_keeps_x_alone():
    """Not F(x), which has x's size; in eager mode and compiled."""
    inputs = linear_inputs(dtype=torch.float32)
    for f in (grkan.rational_linear, torch.compile(grkan.rational_linear, fullgraph=True, backend="aot_eager")):
        stored = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, stored=stored: stored.append(t) or t, lambda t: t):
            f(*inputs)
        known = {t.data_ptr() for t in inputs}
        assert {t.data_ptr() for t in stored} <= known
        assert inputs[0].data_ptr() in {t.data_ptr() for t in stored}


@pytest.mark.parametrize("bias", [True, False])
def test_compile_and_export_of_rational_linear(backend, bias):
    torch.compiler.reset()
    inputs = linear_inputs(bias, torch.float32)

    def f(*inputs):
        return grkan.rational_linear(torch.sin(inputs[0]), *inputs[1:]).square()

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), f(*inputs))
    actual = torch.autograd.grad(compiled(*inputs).sum(), inputs)
    torch.testing.assert_close(actual, torch.autograd.grad(f(*inputs).sum(), inputs), rtol=1e-4, atol=1e-4)

    layer = grkan.RationalLinear(8, 5, bias, num_groups=4)
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(layer, (inputs[0],), dynamic_shapes=({0: batch},))
    x = torch.randn(7, 3, 8)
    torch.testing.assert_close(program.module()(x), layer(x), rtol=1e-5, atol=1e-5)


def test_opcheck_of_rational_linear():
    inputs = linear_inputs()
    grad_argument, detached = torch.randn(2, 3, 5, dtype=torch.float64), [t.detach() for t in inputs[:4]]
    torch.library.opcheck(torch.ops.grkan.rational_linear.default, (*inputs, "abs_of_sum"))
    torch.library.opcheck(torch.ops.grkan.rational_linear.default, (*inputs[:4], None, "sum_of_abs"))
    for needs in itertools.product((True, False), repeat=2):
        torch.library.opcheck(
            torch.ops.grkan.rational_linear_backward.default, (grad_argument, *detached, "abs_of_sum", *needs)
        )


def test_a_flop_counter_sees_the_linear_layer(backend):
    inputs = linear_inputs(dtype=torch.float32)
    with FlopCounterMode(display=False) as counter:
        grkan.rational_linear(*inputs)
    assert counter.get_total_flops() == 2 * 6 * 8 * 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frozen", [(), (0, 1, 2), (3,)])
def test_a_flop_counter_around_the_backward_alone_sees_the_matrix_products(backend, dtype, frozen):
    inputs = [t.detach().requires_grad_(i not in frozen) for i, t in enumerate(linear_inputs(dtype=dtype))]
    trained = [t for t in inputs if t.requires_grad]
    wanted = torch.autograd.grad(grkan.rational_linear(*inputs).square().sum(), trained)
    y = grkan.rational_linear(*inputs).square().sum()
    with FlopCounterMode(display=False) as counter:
        gradients = torch.autograd.grad(y, trained)
    assert counter.get_total_flops() == (1 if frozen else 2) * 2 * 6 * 8 * 5
    for gradient, expected_gradient in zip(gradients, wanted, strict=True):
        assert gradient.dtype == expected_gradient.dtype
        torch.testing.assert_close(gradient, expected_gradient)


def test_the_operator_keeps_x_alone():
    """What autograd stores for the backward: x and the coefficients, nothing that grows with x besides."""
    a, b = coefficients(4, (5, 4))
    x = torch.randn(16, 8, requires_grad=True)
    stored = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: stored.append(t) or t, lambda t: t):
        grkan.group_rational(x, a, b)
    assert sorted(t.data_ptr() for t in stored) == sorted(t.data_ptr() for t in (x, a, b))


def test_the_same_bits_each_time(backend):
    torch.manual_seed(9)
    x, (a, b) = torch.randn(64, 197, 16), coefficients(8, (5, 4))
    runs = [torch.autograd.grad(grkan.group_rational(x, a, b).square().sum(), (a, b)) for _ in range(3)]
    for da, db in runs[1:]:
        assert torch.equal(da, runs[0][0])
        assert torch.equal(db, runs[0][1])


def test_b_learns_from_the_identity_start(backend):
    a = torch.tensor([[0.0, 1, 0, 0, 0, 0]] * 4, requires_grad=True)
    for zero in (0.0, -0.0):
        b = torch.full((4, 4), zero, requires_grad=True)
        torch.manual_seed(10)
        grkan.group_rational(torch.randn(64, 8), a, b).square().sum().backward()
        assert (b.grad != 0).all()


# Coefficients as vectors, as the layers keep them.


@pytest.mark.parametrize("share", ["none", "numerator", "denominator"])
@pytest.mark.parametrize("order", [(5, 4), (3, 0)], ids=str)
def test_vectors_of_coefficients(backend, order, share):
    """The same values, first and second derivatives as with matrices."""
    torch.manual_seed(14)
    matrices = coefficients(4, order, share, dtype=torch.float64)
    vectors = tuple(t.detach().flatten().requires_grad_() for t in matrices)
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)

    def results(a, b, of_vectors):
        f, g = (
            (op.group_rational_of_vectors, op.rational_linear_of_vectors)
            if of_vectors
            else (grkan.group_rational, grkan.rational_linear)
        )
        y = f(x, a, b, order, "abs_of_sum") if of_vectors else f(x, a, b)
        z = g(x, a, b, weight, None, order, "abs_of_sum") if of_vectors else g(x, a, b, weight)
        inputs = (x, a, b, weight)
        options = {"allow_unused": True, "materialize_grads": True}
        plain = torch.autograd.grad(y.sum() + z.square().sum(), inputs, retain_graph=True, **options)
        again = torch.autograd.grad(y.sum() + z.square().sum(), inputs, create_graph=True, **options)
        second = torch.autograd.grad(sum(t.square().sum() for t in again), inputs, **options)
        return [t.flatten() for t in (y, z, *plain, *second)]

    torch.testing.assert_close(results(*vectors, True), results(*matrices, False), rtol=1e-9, atol=1e-9)


def test_vectors_of_coefficients_in_a_graph(backend):
    torch.compiler.reset()
    torch.manual_seed(15)
    a, b = (t.detach().flatten().requires_grad_() for t in coefficients(4, (5, 4)))
    x = torch.randn(3, 8)

    def f(x):
        return op.group_rational_of_vectors(x, a, b, (5, 4), "abs_of_sum", -1, 4, 2)

    torch.testing.assert_close(torch.compile(f, fullgraph=True, backend="aot_eager")(x), f(x))
    torch.testing.assert_close(vmap(f)(x), f(x))
    torch.testing.assert_close(torch.autograd.grad(f(x).sum(), (a, b))[0].shape, a.shape)


@pytest.mark.parametrize(
    ("a", "b", "group_width", "message"),
    [
        (
            torch.ones(23),
            torch.ones(16),
            None,
            r"numerator must be a vector of rows of 6 coefficients; got shape \(23,\)",
        ),
        (torch.ones(4, 6), torch.ones(16), None, r"numerator must be a vector .*; got shape \(4, 6\)"),
        (torch.ones(24), torch.ones(15), None, r"denominator must be a vector of rows of 4 coefficients"),
        (torch.ones(24), torch.ones(16), 4, r"x must have 16 channels in dimension -1, .*; got shape \(3, 8\)"),
        (torch.ones(12), torch.ones(8), 2, "x must have 4 channels"),
        (torch.ones(18), torch.ones(12), None, r"numerator must be a vector of 4 rows of 6 .*; got shape \(18,\)"),
        (torch.ones(24), torch.ones(12), None, r"denominator must be a vector of 4 rows .*; got shape \(12,\)"),
        (torch.ones(0), torch.ones(0), None, r"numerator must be a vector of 4 rows .*; got shape \(0,\)"),
    ],
)
def test_bad_vectors(a, b, group_width, message):
    with pytest.raises(ValueError, match=message):
        op.group_rational_of_vectors(X, a, b, (5, 4), "abs_of_sum", -1, 4, group_width)


# Tracers and exporters.


class Two(torch.nn.Module):
    """Both functions; channels first for the one, last for the other."""

    def __init__(self):
        super().__init__()
        self.a, self.b = (torch.nn.Parameter(c.detach()) for c in coefficients(4, (5, 4)))
        self.weight = torch.nn.Parameter(torch.randn(5, 8))

    def forward(self, x):
        y = grkan.group_rational(x, self.a, self.b, channel_dim=1)
        return grkan.rational_linear(y.movedim(1, -1), self.a, self.b, self.weight, form="sum_of_abs")


def images_in_other_formats():
    yield torch.randn(3, 8, 5, 7)
    yield torch.randn(1, 8, 2, 2).to(memory_format=torch.channels_last)
    yield torch.randn(2, 4, 5, 8).permute(0, 3, 1, 2)
    yield torch.randn(0, 8, 2, 2)


def test_fx_sees_one_operation_for_each_function():
    model = Two()
    traced = torch.fx.symbolic_trace(model)
    called = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert called == [grkan.group_rational, grkan.rational_linear]
    for x in images_in_other_formats():
        torch.testing.assert_close(traced(x), model(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("arguments", [{}, {"order": (3, 0)}, {"share_numerator": True, "form": "sum_of_abs"}], ids=str)
def test_a_traced_graph_can_be_scripted(arguments):
    layer, x = grkan.GRKAN(16, **arguments), torch.randn(5, 16)
    scripted = torch.jit.script(torch.fx.symbolic_trace(layer))
    assert torch.equal(scripted(x), layer(x))


def test_torch_function_is_heard():
    class Heard(torch.Tensor):
        calls: ClassVar = []

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            cls.calls.append((function, kwargs))
            return super().__torch_function__(function, types, args, kwargs or {})

    weight = torch.randn(5, 8)
    for place in range(3):
        tensors = [X, A, B]
        tensors[place] = tensors[place].as_subclass(Heard)
        y = grkan.group_rational(*tensors, form="sum_of_abs", channel_dim=1)
        assert Heard.calls[0] == (grkan.group_rational, {"form": "sum_of_abs", "channel_dim": 1})
        assert type(y) is Heard
        torch.testing.assert_close(y.as_subclass(torch.Tensor), grkan.group_rational(X, A, B, form="sum_of_abs"))
        Heard.calls.clear()
        assert type(grkan.rational_linear(*tensors, weight)) is Heard
        assert Heard.calls[0][0] is grkan.rational_linear
        Heard.calls.clear()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("grad_mode", [True, False])
@pytest.mark.parametrize("traced_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_jit_trace(backend, traced_format, grad_mode):
    """Right for another batch, size and memory format; no size that Python compared is warned of."""
    torch.manual_seed(16)
    model = Two()
    with torch.set_grad_enabled(grad_mode), warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        traced = torch.jit.trace(model, (torch.randn(2, 8, 3, 4).to(memory_format=traced_format),))
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    for x in images_in_other_formats():
        torch.testing.assert_close(loaded(x), model(x), rtol=1e-5, atol=1e-5)
    actual = torch.autograd.grad(loaded(x := torch.randn(1, 8, 2, 2)).square().sum(), list(loaded.parameters()))
    wanted = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)
    assert ("grkan::group_rational" in str(loaded.inlined_graph)) == (backend != "reference")


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_trace_of_plain_operations_is_right_for_other_values():
    a, b = (c.detach() for c in coefficients(4, (5, 4)))
    with grkan.set_backend("reference"):
        traced = torch.jit.trace(lambda x: grkan.group_rational(x, a, b), (X,))
    torch.testing.assert_close(traced(1e12 * X), grkan.group_rational(1e12 * X, a, b))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("dynamo", [True, False])
def test_onnx(tmp_path, dynamo):
    """With the default backend, which the exporter does not know."""
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.manual_seed(17)
    model, path = Two().eval(), tmp_path / "two.onnx"
    sizes = {0: "batch", 2: "height", 3: "width"}
    options = {"dynamic_shapes": (sizes,)} if dynamo else {"input_names": ["x"], "dynamic_axes": {"x": sizes}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (torch.randn(2, 8, 3, 4),), str(path), dynamo=dynamo, verbose=False, **options)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    x = torch.randn(3, 8, 5, 7)
    (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(output), model(x).detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_program_keeps_the_operators(strict):
    """With symbols for sizes, too."""
    torch.compiler.reset()
    model, x = Two(), torch.randn(2, 8, 3, 4)
    sizes = ({0: torch.export.Dim("batch", min=1)},)
    program = torch.export.export(model, (x,), dynamic_shapes=sizes, strict=strict).run_decompositions()
    assert torch.ops.grkan.group_rational.default in {node.target for node in program.graph.nodes}
    x = torch.randn(5, 8, 3, 4)
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-5, atol=1e-5)


class Selected(torch.nn.Module):
    """As many rows as the data say: experts, dropped tokens, masked inputs."""

    def __init__(self):
        super().__init__()
        self.layer = grkan.GRKAN(8, 16)

    def forward(self, x):
        return self.layer(x[x.sum(-1) > 0])


@pytest.mark.parametrize("strict", [True, False])
def test_export_with_as_many_rows_as_the_data_say(backend, strict):
    torch.compiler.reset()
    model, x = Selected(), torch.randn(5, 8)
    program = torch.export.export(model, (x,), strict=strict).module()
    for other in (x, -torch.ones(5, 8), torch.ones(5, 8)):
        torch.testing.assert_close(program(other), model(other))


def test_the_first_call_compiled_without_a_kernel(monkeypatch):
    monkeypatch.setattr(dispatch, "KERNELS", {})
    monkeypatch.setattr(dispatch, "find_kernel", lambda _: None)
    monkeypatch.setattr(dispatch, "_noticed", set())
    torch.compiler.reset()
    layer, x = grkan.GRKAN(8, 16), torch.randn(4, 8)
    with pytest.warns(RuntimeWarning, match="this installation of grkan has no kernel for the CPU"):
        y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(y, layer(x))


def test_compile_where_ci_is_set(monkeypatch):
    """Inductor refuses operators with a decomposition in PyTorch's table where the environment variable CI is set."""
    monkeypatch.setenv("CI", "true")
    torch.compiler.reset()
    model, x = Two(), torch.randn(2, 8, 3, 4)
    with torch._inductor.config.patch(force_disable_caches=True):
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x))


def test_operators_count_dimensions_from_the_end_too():
    x, (a, b) = torch.randn(2, 8, 3, requires_grad=True), coefficients(4, (5, 4))
    y, z = (torch.ops.grkan.group_rational(x, a, b, "abs_of_sum", dim) for dim in (1, -2))
    torch.testing.assert_close(z, y)
    torch.testing.assert_close(torch.autograd.grad(z.sum(), (x, a, b)), torch.autograd.grad(y.sum(), (x, a, b)))


# Other kinds of tensors.


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
def test_nested_tensors(backend, layout):
    torch.manual_seed(18)
    parts = [torch.randn(length, 8) for length in (3, 1, 4)]
    inputs = linear_inputs(dtype=torch.float32)[1:]
    nested = torch.nested.nested_tensor(parts, layout=layout, requires_grad=True)
    y, z = grkan.group_rational(nested, *inputs[:2]), grkan.rational_linear(nested, *inputs)
    if layout is torch.jagged:
        assert (y + nested).shape == nested.shape  # a residual connection: the lengths are known to be the same
    loss = sum(t.square().sum() for t in (*y.unbind(), *z.unbind()))
    dx, *rest = torch.autograd.grad(loss, (nested, *inputs))
    parts = [part.requires_grad_() for part in parts]
    wanted = [(grkan.group_rational(x, *inputs[:2]), grkan.rational_linear(x, *inputs)) for x in parts]
    loss = sum(t.square().sum() for pair in wanted for t in pair)
    torch.testing.assert_close(list(y.unbind()), [pair[0] for pair in wanted])
    gradients = torch.autograd.grad(loss, (*parts, *inputs))
    torch.testing.assert_close((*dx.unbind(), *rest), gradients, rtol=1e-4, atol=1e-4)


def test_jagged_tensors_of_other_kinds():
    """With holes, and with the channels in front; not across parts of different lengths."""
    holes = torch.nested.narrow(
        torch.randn(2, 9, 8), 1, torch.tensor([0, 2]), torch.tensor([3, 4]), layout=torch.jagged
    )
    y = grkan.group_rational(holes, A, B)
    assert y.shape == holes.shape
    torch.testing.assert_close(y.unbind()[1], grkan.group_rational(holes.unbind()[1], A, B))
    nested = torch.nested.nested_tensor([torch.randn(3, 8), torch.randn(4, 8)], layout=torch.jagged)
    y = grkan.group_rational(nested.transpose(1, 2), A, B, channel_dim=1)
    torch.testing.assert_close(y.transpose(1, 2).unbind()[1], grkan.group_rational(nested.unbind()[1], A, B))
    for channel_dim in (0, 1, 3):
        with pytest.raises(ValueError, match="channel_dim must be a dimension in which all parts"):
            grkan.group_rational(nested, A, B, channel_dim=channel_dim)


def test_zero_tensors(backend):
    """A gradient that PyTorch knows to be zero has no memory."""
    inputs = [t.requires_grad_() for t in linear_inputs(dtype=torch.float32)]
    x, a, b = inputs[:3]
    for y, of in ((grkan.group_rational(x, a, b), (x, a, b)), (grkan.rational_linear(*inputs), inputs)):
        for gradient in torch.autograd.grad(y, of, torch._efficientzerotensor(y.shape)):
            assert not gradient.any()
    zero = torch._efficientzerotensor((3, 8))
    torch.testing.assert_close(grkan.group_rational(zero, a, b), grkan.group_rational(torch.zeros(3, 8), a, b))


def test_a_profiler_sees_the_kernel():
    x, a, b = torch.randn(3, 8, requires_grad=True), *coefficients(4, (5, 4))
    with torch.profiler.profile() as profile:
        grkan.group_rational(x, a, b).sum().backward()
    assert {"grkan::forward", "grkan::backward"} <= {event.name for event in profile.events()}


def test_tensors_whose_memory_holds_other_numbers(backend):
    """The real and imaginary parts of a conjugate number are views with a sign that the memory does not have."""
    x, grad = torch.complex(torch.randn(3, 8), torch.randn(3, 8)), torch.randn(3, 8)
    a, b = torch.randn(4, 6), torch.randn(4, 4)

    def negated(t):
        view = torch.complex(torch.zeros_like(t), -t).conj().imag
        assert view.is_neg()
        torch.testing.assert_close(view, t)
        return view

    inputs = [t.requires_grad_() for t in (x.imag.clone(), a, b)]
    wanted = grkan.group_rational(*inputs)
    gradients = torch.autograd.grad(wanted, inputs, grad)
    others = [negated(t.detach()).requires_grad_() for t in inputs]
    y = grkan.group_rational(*others)
    torch.testing.assert_close(y, wanted)
    torch.testing.assert_close(torch.autograd.grad(y, others, negated(grad)), gradients)
    with torch.no_grad():
        for k in range(3):
            one = [other if i == k else t for i, (t, other) in enumerate(zip(inputs, others, strict=True))]
            torch.testing.assert_close(grkan.group_rational(*one), wanted)
    zeros = torch._efficientzerotensor((4, 4))
    expected = grkan.group_rational(x.real.detach(), a, torch.zeros(4, 4))
    torch.testing.assert_close(grkan.group_rational(x.real.detach(), a, zeros), expected)


@pytest.mark.parametrize("shape", [(0, 8), (5, 0), (0, 0)], ids=str)
def test_a_weight_without_rows_or_columns(backend, shape):
    a, b = coefficients(4, (5, 4))
    inputs = [torch.randn(3, shape[1], requires_grad=True), a, b, torch.randn(shape, requires_grad=True)]
    y = grkan.rational_linear(*inputs)
    assert y.shape == (3, shape[0])
    gradients = torch.autograd.grad(y.sum(), inputs, create_graph=True)
    assert [t.shape for t in gradients] == [t.shape for t in inputs]
    assert not any(t.any() for t in gradients)


def test_saved_tensors_that_come_back_otherwise():
    """Hooks may hand back x with other strides."""
    inputs = [t.requires_grad_() for t in linear_inputs(dtype=torch.float32)]

    def losses():
        return grkan.group_rational(*inputs[:3]).square().sum() + grkan.rational_linear(*inputs).square().sum()

    wanted = torch.autograd.grad(losses(), inputs)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.mT.contiguous(), lambda t: t.mT):
        loss = losses()
    torch.testing.assert_close(torch.autograd.grad(loss, inputs), wanted, rtol=1e-5, atol=1e-5)


# Autocast.


class CountCasts(TorchDispatchMode):
    def __init__(self, shape):
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._to_copy.default and args[0].shape == self.shape
        return function(*args, **(kwargs or {}))


def linear_in_half(inputs, wanted=False):
    """What `rational_linear` is to be under autocast: F in half precision, then PyTorch's linear layer."""
    x, a, b, weight, bias = inputs
    f = grkan.group_rational(x.bfloat16(), a, b)
    return torch.nn.functional.linear(f, weight, bias)


@pytest.mark.parametrize("grad_mode", [True, False])
def test_autocast_casts_a_weight_once(backend, grad_mode):
    """As for `F.linear`, with whose casts it shares: seen here by the memory of the copy that the graph keeps."""
    inputs = linear_inputs(dtype=torch.float32)
    copies = set()
    with torch.set_grad_enabled(grad_mode), torch.autocast("cpu", torch.bfloat16):
        with CountCasts(inputs[3].shape) as counter:
            grkan.rational_linear(*inputs)
            linear_in_half(inputs)
        assert counter.count == 1

        def keep(t):
            if t.dtype == torch.bfloat16 and t.numel() == inputs[3].numel():
                copies.add(t.data_ptr())
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            kept = [grkan.rational_linear(*inputs) for _ in range(3)] + [linear_in_half(inputs)]
    assert len(copies) == grad_mode
    for y in kept[:-1]:
        torch.testing.assert_close(y, kept[-1], rtol=0, atol=0)


def test_gradients_under_autocast(backend):
    """First and second ones, of several calls in one block; what is kept is x and the weight in half precision."""
    inputs = linear_inputs(dtype=torch.float32)
    stored = []

    def gradients(f):
        with torch.autocast("cpu", torch.bfloat16):
            y = f(inputs) + f(inputs)
        first = torch.autograd.grad(y.float().square().sum(), inputs, retain_graph=True)
        again = torch.autograd.grad(y.float().square().sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(t.float().square().sum() for t in again), inputs, allow_unused=True)
        return [*first, *second]

    def fused(inputs):
        return grkan.rational_linear(*inputs)

    actual, wanted = gradients(fused), gradients(linear_in_half)
    for g, w in zip(actual, wanted, strict=True):
        assert g.dtype == torch.float32
        torch.testing.assert_close(g / w.abs().max(), w / w.abs().max(), rtol=0, atol=0.03)
    if backend != "reference":
        with (
            torch.autocast("cpu", torch.bfloat16),
            torch.autograd.graph.saved_tensors_hooks(lambda t: stored.append(t) or t, lambda t: t),
        ):
            fused(inputs)
        assert sorted(t.shape for t in stored) == sorted(t.shape for t in inputs[:4])


def test_autocast_within_autocast(backend):
    inputs = linear_inputs(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = grkan.rational_linear(*inputs)
        with torch.autocast("cpu", enabled=False):
            assert grkan.rational_linear(*inputs).dtype == torch.float32
        if backend != "reference":  # F.linear cannot
            with torch.autocast("cpu", torch.float16):
                z = grkan.rational_linear(*inputs)
            assert z.dtype == torch.float16
            torch.testing.assert_close(y.float(), z.float(), rtol=0.05, atol=0.05)


# Errors.

X, A, B = torch.randn(3, 8), torch.randn(4, 6), torch.randn(4, 4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0], A, B), TypeError, "x must be a Tensor; got list"),
        ((X.long(), A, B), TypeError, "x must be float16, bfloat16, float32 or float64; got int64"),
        ((X.cfloat(), A, B), TypeError, "x must be .*; got complex64"),
        ((X.to(torch.float8_e4m3fn), A, B), TypeError, "x must be .*; got float8_e4m3fn"),
        ((torch.tensor(1.0), A, B), ValueError, "x must have at least one dimension"),
        ((X, A.long(), B), TypeError, "numerator must have a floating dtype; got int64"),
        ((X, A, B.cfloat()), TypeError, "denominator must have a floating dtype; got complex64"),
        ((X, None, B), TypeError, "numerator must be a Tensor; got NoneType"),
        ((X, A[0], B), ValueError, r"numerator must have shape .*; got \(6,\)"),
        ((X, A[:, :0], B), ValueError, r"numerator must have shape .*; got \(4, 0\)"),
        ((X, A[:0], B), ValueError, r"numerator must have shape .*; got \(0, 6\)"),
        ((X, A, B[0]), ValueError, r"denominator must have shape .*; got \(4,\)"),
        ((X, A, B[:0]), ValueError, r"denominator must have shape .*; got \(0, 4\)"),
        ((X, A, B[:2]), ValueError, "same number of rows.*; got 4 and 2"),
        ((X[:, :7], A, B), ValueError, r"divisible by the number of groups, 4 .*; got 7 channels in dimension -1"),
        ((X, A.to("meta"), B), ValueError, "numerator must be on the device of x, cpu; got meta"),
        ((X.to("meta"), A.to("meta"), B), ValueError, "denominator must be on the device of x, meta; got cpu"),
        ((X.to_sparse(), A, B), TypeError, "x must be dense, as x.to_dense\\(\\) is; got layout sparse_coo"),
    ],
)
def test_bad_tensors(arguments, error, message):
    with pytest.raises(error, match=message):
        grkan.group_rational(*arguments)


@pytest.mark.parametrize(
    ("weight", "bias", "error", "message"),
    [
        (torch.randn(5, 7), None, ValueError, r"weight must have shape \(out_features, 8\).*; got \(5, 7\)"),
        (torch.randn(8), None, ValueError, r"weight must have shape .*; got \(8,\)"),
        ([1.0], None, TypeError, "weight must be a Tensor; got list"),
        (torch.ones(5, 8).long(), None, TypeError, "weight must have the dtype of x, float32; got int64"),
        (torch.ones(5, 8).double(), None, TypeError, "weight must have the dtype of x, float32; got float64"),
        (torch.ones(5, 8, device="meta"), None, ValueError, "weight must be on the device of x, cpu; got meta"),
        (torch.ones(5, 8), torch.ones(8), ValueError, r"bias must have shape \(5,\).*; got \(8,\)"),
        (torch.ones(5, 8), 1.0, TypeError, "bias must be a Tensor; got float"),
        (torch.ones(5, 8), torch.ones(5).half(), TypeError, "bias must have the dtype of x, float32; got float16"),
    ],
)
def test_bad_linear_layers(weight, bias, error, message):
    with pytest.raises(error, match=message):
        grkan.rational_linear(X, A, B, weight, bias)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"form": "version_b"}, ValueError, "form must be 'abs_of_sum' or 'sum_of_abs'; got 'version_b'"),
        ({"form": 3}, TypeError, "form must be 'abs_of_sum' or 'sum_of_abs'; got 3"),
        ({"form": None}, TypeError, "form must be"),
        ({"channel_dim": 2}, ValueError, r"channel_dim must lie in \[-2, 1\] .*; got 2"),
        ({"channel_dim": -3}, ValueError, r"channel_dim must lie in \[-2, 1\] .*; got -3"),
        ({"channel_dim": 1.0}, TypeError, "channel_dim must be an int; got 1.0"),
        ({"channel_dim": 0}, ValueError, "got 3 channels in dimension 0"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        grkan.group_rational(X, A, B, **options)


def test_a_call_like_an_earlier_one_is_checked_all_the_same():
    """Earlier calls are remembered by all that was checked."""
    weight, bias = torch.randn(5, 8), torch.randn(5)
    grkan.group_rational(X, A, B, channel_dim=1)
    grkan.rational_linear(X, A, B, weight, bias)
    for arguments, error in (
        ((X.to_sparse(), A, B), TypeError),
        ((X.to_mkldnn(), A, B), TypeError),
        ((X, A.long(), B), TypeError),
        ((X, A, B.to("meta")), ValueError),
        ((X.to("meta"), A, B), ValueError),
        ((X, A, B, weight.double()), TypeError),
        ((X, A, B, weight, bias.double()), TypeError),
        ((X, A, B, weight, bias.to("meta")), ValueError),
        ((X, A, B, weight, torch.randn(1)), ValueError),
    ):
        with pytest.raises(error):
            (grkan.group_rational if len(arguments) == 3 else grkan.rational_linear)(*arguments)
    for channel_dim in (True, 1.0):
        with pytest.raises(TypeError, match="channel_dim must be an int"):
            grkan.group_rational(X, A, B, channel_dim=channel_dim)
    with pytest.raises(TypeError, match="form must be"):
        grkan.group_rational(X, A, B, form=["abs_of_sum"])


@pytest.mark.parametrize("name", layouts())
def test_a_kernel_sees_one_layout(name, monkeypatch):
    """Memory without gaps, as [rows, groups, width]; a dense x is used as it lies, without a copy."""
    x, channel_dim = layouts()[name]
    seen, widths = [], []

    def record(function, count):
        def wrapper(*arguments):
            seen.extend(arguments[:count])
            widths.append(arguments[count + 3])
            return function(*arguments)

        return wrapper

    kernel = dispatch.Kernel(record(dispatch.REFERENCE.forward, 1), record(dispatch.REFERENCE.backward, 2))
    monkeypatch.setitem(dispatch.KERNELS, "cpu", kernel)
    with grkan.set_backend("native"):
        assert_agrees(x, *coefficients(4, (5, 4)), channel_dim=channel_dim)
    assert len(seen) == 3  # x; grad and x
    for t in seen:
        assert t.stride() == torch.empty_like(x).stride() or not t.numel()
        assert sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) == t.numel() - 1 or (
            not t.numel()
        )
    assert all(t.numel() % (4 * width) == 0 for t, width in zip(seen, widths, strict=False) if t.numel())
    dense = torch.empty_like(x).stride() == x.stride()
    if dense and x.numel():
        assert seen[0].data_ptr() == x.data_ptr()


def test_every_pair_of_shared_rows():
    """(G, G), (1, G), (G, 1) and (1, 1), which is one group."""
    x = torch.randn(3, 8)
    for rows_a, rows_b in itertools.product((1, 4), repeat=2):
        a, b = torch.randn(rows_a, 6), torch.randn(rows_b, 4)
        assert_agrees(x, a.requires_grad_(), b.requires_grad_())
