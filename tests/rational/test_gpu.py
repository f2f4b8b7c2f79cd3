"""The Triton kernels: their numbers by Triton's interpreter, their quality by the compiled code, and the rest on a GPU.

Tests of numbers carry the mark `gpu` and run wherever the kernels do: on a GPU, and in a process of their own in which
Triton interprets them on the CPU, as nothing can be compiled there. `make gpu` runs all of them on a GPU.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import grkan
from grkan.rational import dispatch, table
from grkan.rational.reference import FORMS, rational, rational_backward

HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_GPU = torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if HAS_GPU else "cpu"
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")

if HAS_TRITON:
    from grkan.rational import gpu

    LONGEST_CHUNK = gpu.LONGEST_CHUNK


def runs_kernels(test):
    """Of the numbers of the kernels: on a GPU, or in the interpreter."""
    reason = "no GPU; `test_numbers_by_the_interpreter` runs it"
    return pytest.mark.gpu(pytest.mark.skipif(not (HAS_GPU or INTERPRETED), reason=reason)(test))


def runs_on_a_gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(not HAS_GPU, reason="no GPU")(test))


# Numbers.

# The interpreter truncates where a GPU rounds to bfloat16.
TOLERANCE = {torch.float32: 5e-6, torch.float64: 1e-12, torch.bfloat16: 2**-7, torch.float16: 2**-9}
DTYPES = list(TOLERANCE)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several chunks of several tiles for small tensors: the interpreter takes a millisecond for a line of a kernel."""
    if HAS_TRITON and INTERPRETED:
        monkeypatch.setattr(gpu, "SHORTEST_CHUNK", 512)
        monkeypatch.setattr(gpu, "LONGEST_CHUNK", 512)
        monkeypatch.setattr(gpu, "SUM_BLOCK", 2)


@pytest.fixture(autouse=True)
def language_patched_once(monkeypatch):
    """Half of the interpreter's time goes into patching Triton's language anew for each call of a device function."""
    if not (HAS_TRITON and INTERPRETED):
        return
    import triton.language as tl
    from triton.runtime import interpreter

    patch = interpreter._patch_lang

    def patch_unless_done(function):
        languages = [module for module in (tl, tl.core) if module in function.__globals__.values()]
        if any(tl.core.is_builtin(module.arange) for module in languages):
            return patch(function)

    monkeypatch.setattr(interpreter, "_patch_lang", patch_unless_done)


def inputs(size, order=(5, 4), dtype=torch.float32, seed=0):
    """x, grad, numerator, denominator on the device."""
    rows, groups, width = size
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    wide = torch.promote_types(dtype, torch.float32)
    x, grad = draw(rows, groups, width).to(dtype), draw(rows, groups, width).to(dtype)
    return tuple(t.to(DEVICE) for t in (x, grad, draw(groups, order[0] + 1).to(wide), draw(groups, order[1]).to(wide)))


def run(x, grad, a, b, form):
    """y, dx, da, db of the kernels."""
    width = x.shape[-1]
    dx, da, db, y = gpu.backward(grad, x, a, b, form, width, True)
    assert torch.equal(gpu.forward(x, a, b, form, width).nan_to_num(7), y.nan_to_num(7))
    return y, dx, da, db


def wanted_of(x, grad, a, b, form):
    exact = [t.double() for t in (x, a, b)]
    return rational(*exact, form), *rational_backward(grad.double(), *exact, form)


def assert_right(x, grad, a, b, form, sums=True):
    """Relative to the largest of each tensor, in float64; y and dx scalar by scalar."""
    y, dx, da, db = run(x, grad, a, b, form)
    wanted = wanted_of(x, grad, a, b, form)
    for actual, expected in ((y, wanted[0]), (dx, wanted[1])):
        assert (actual.dtype, actual.shape, actual.stride()) == (x.dtype, x.shape, x.stride())
        tolerance = TOLERANCE[x.dtype]
        expected = expected.to(x.dtype)  # an infinity of the narrower type is where float64 has a large number
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, equal_nan=True)
    for actual, expected, source in ((da, wanted[2], a), (db, wanted[3], b)) if sums else ():
        assert (actual.dtype, actual.shape) == (source.dtype, source.shape)
        if expected.numel():
            scale, tolerance = expected.abs().max().item(), min(TOLERANCE[x.dtype], 5e-6)
            torch.testing.assert_close(actual.double() / scale, expected / scale, rtol=0, atol=tolerance)


@needs_triton
@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [(1, 1, 1), (3, 5, 7), (40, 2, 24), (3, 2, 1023)], ids=str)
def test_sizes(size, form, dtype):
    if INTERPRETED and size[2] > 24 and dtype is not torch.float32:
        pytest.skip("takes long in the interpreter")
    assert_right(*inputs(size, dtype=dtype), form)


@needs_triton
@runs_kernels
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("order", [(7, 6), (0, 0), (1, 0), (0, 2), (4, 5), (9, 8)], ids=str)
def test_orders(order, form):
    assert_right(*inputs((9, 3, 4), order), form)


@needs_triton
@runs_kernels
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shared", ["numerator", "denominator"])
def test_shared_rows(shared, form):
    x, grad, a, b = inputs((50, 4, 8))
    a, b = (a[:1], b) if shared == "numerator" else (a, b[:1])
    assert_right(x, grad, a, b, form)


@needs_triton
@runs_kernels
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float8_e4m3fn], ids=str)
def test_coefficients_of_any_dtype(dtype):
    x, grad, a, b = inputs((9, 2, 8))
    a, b = a.to(dtype), b.to(dtype)
    y, dx, da, db = run(x, grad, a, b, "abs_of_sum")
    assert (da.dtype, db.dtype) == (dtype, dtype)
    wanted = wanted_of(x, grad, a, b, "abs_of_sum")
    for actual, expected in ((y, wanted[0]), (dx, wanted[1])):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
    eps = max(torch.finfo(dtype).eps, 1e-5)
    for actual, expected in ((da, wanted[2]), (db, wanted[3])):
        torch.testing.assert_close(actual.double(), expected, rtol=eps, atol=eps * expected.abs().max().item())


@needs_triton
@runs_kernels
def test_indices_of_64_bits(monkeypatch):
    """The code for tensors of more than 2^31 scalars, on a small one."""
    plan = gpu.plan

    def long_plan(*arguments, gradient):
        programs, sizes, options = plan(*arguments, gradient=gradient)
        return programs, sizes, {**options, "LONG": True}

    monkeypatch.setattr(gpu, "plan", long_plan)
    assert_right(*inputs((40, 3, 24)), "abs_of_sum")


@needs_triton
@runs_kernels
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("grad", [1.0, 1e-20, 1e-25, 1e-30])
@pytest.mark.parametrize("x", [5e3, 5e5])
def test_small_gradients_of_large_x(x, grad, form):
    """g / Q underflows long before dx does."""
    x, grad = (torch.full((1, 1, 1), value, device=DEVICE) for value in (x, grad))
    a = torch.tensor([[0.1, 0.9, -0.4, 0.3, 0.2, 0.05]], device=DEVICE)
    b = torch.tensor([[0.3, -0.5, 0.2, 0.7]], device=DEVICE)
    found, wanted = run(x, grad, a, b, form), wanted_of(x, grad, a, b, form)
    torch.testing.assert_close(found[1].double(), wanted[1], rtol=2e-6, atol=0)
    torch.testing.assert_close(found[2][0, 4:].double(), wanted[2][0, 4:], rtol=2e-6, atol=0)
    torch.testing.assert_close(found[3][0, 2:].double(), wanted[3][0, 2:], rtol=2e-6, atol=0)


@needs_triton
@runs_kernels
def test_sums_of_equal_terms(monkeypatch):
    """In the longest chunk, where float32 may round every one of them to the same side."""
    monkeypatch.setattr(gpu, "PROGRAMS", 1)
    monkeypatch.setattr(gpu, "LONGEST_CHUNK", LONGEST_CHUNK)
    x, grad, a, b = inputs((4, 1, 1024))
    _, _, da, _ = run(x.zero_(), grad.fill_(1.2), a, b, "abs_of_sum")
    torch.testing.assert_close(da[0, 0].double(), grad.double().sum(), rtol=1e-6, atol=0)


EXTREMES = [0.0, -0.0, 1e-45, -1e-45, 1e-38, 1e-30, -1e-30, 9e3, -6e5, 1e7, -1e20, 3e38, torch.inf, -torch.inf]


@needs_triton
@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("order", [(5, 4), (3, 2), (4, 5)], ids=str)
def test_extremes_among_others(order, form, dtype):
    """A chunk that holds one is computed in float64; what is beside it does not change."""
    x, grad, a, b = inputs((4, 2, 24), order, dtype)
    at = torch.randperm(x.numel(), generator=torch.Generator().manual_seed(1))[: 2 * len(EXTREMES)].to(DEVICE)
    x.view(-1)[at] = torch.tensor(EXTREMES, dtype=torch.float64, device=DEVICE).repeat(2).to(dtype)
    assert_right(x, grad, a, b, form, sums=False)
    # The terms of large x would drown the others in the sums.
    grad.view(-1)[at] *= torch.where(x.view(-1)[at].abs() > 1e3, 0.0, 1.0).to(dtype)
    assert_right(x, grad, a, b, form)


@needs_triton
@runs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_nan_stays_alone(form, dtype):
    """And does not hide from its lane that there is an infinity, too."""
    x, grad, a, b = inputs((3, 2, 24), dtype=dtype)
    x[1, 1, 4] = torch.inf
    clean = run(x, grad, a, b, form)
    x[1, 1, 5] = torch.nan
    y, dx, da, db = run(x, grad, a, b, form)
    for actual, expected in ((y, clean[0]), (dx, clean[1])):
        assert actual[1, 1, 5].isnan()
        expected[1, 1, 5] = torch.nan
        torch.testing.assert_close(actual, expected, equal_nan=True)
    assert da[1].isnan().all()
    assert db[1].isnan().all()
    assert torch.equal(da[0], clean[2][0])


@needs_triton
@runs_kernels
@pytest.mark.parametrize("zero", [0.0, -0.0])
@pytest.mark.parametrize("form", FORMS)
def test_sign_of_both_zeros_is_plus_one(form, zero):
    x, grad, a, b = inputs((3, 2, 24))
    b.fill_(zero)
    x[0, 0, :2] = torch.tensor([0.0, -0.0])
    assert_right(x, grad, a, b, form)


@needs_triton
@runs_kernels
def test_sign_near_zero_where_b_1_is_zero():
    """A = b_2 x^2 + ... underflows, and its sign is that of b_2, or of b_3 x^3."""
    x, grad, a, b = inputs((3, 2, 24))
    x *= 1e-25
    b[:, 0] = 0
    b[0, 1], b[1, 1] = -1, 0
    db = run(x, grad, a, b, "abs_of_sum")[3]
    torch.testing.assert_close(db[:, 0].double(), wanted_of(x, grad, a, b, "abs_of_sum")[3][:, 0], rtol=1e-5, atol=0)


@needs_triton
@pytest.mark.gpu
@pytest.mark.skipif(not INTERPRETED, reason="a compiled kernel cannot be changed; the interpreter runs it")
def test_the_tables_functions_need_no_float64(monkeypatch):
    """Swish has b_1 = 0, with which a model starts."""

    def fail(*_, **__):
        raise AssertionError("the chunk is computed once more")

    monkeypatch.setattr(gpu, "_careful", fail)
    for name in ("swish", "gelu"):
        x, grad, _, _ = inputs((40, 2, 24))
        a, b = (torch.tensor([row] * 2) for row in table.coefficients(name, (5, 4)))
        assert_right(x, grad, a, b, "abs_of_sum")
    with pytest.raises(Exception, match="once more"):
        run(x.fill_(1e30), grad, a, b, "abs_of_sum")


@needs_triton
@runs_kernels
def test_sums_beyond_float32():
    """Coefficients in float64 have gradients in float64, whatever x has."""
    x, grad, a, b = inputs((3, 2, 24), (2, 3))
    x, a, b = x.fill_(1e9), torch.zeros_like(a, dtype=torch.float64), torch.zeros_like(b, dtype=torch.float64)
    a[:, 2] = 1
    db = run(x, grad, a, b, "abs_of_sum")[3]
    torch.testing.assert_close(db, wanted_of(x, grad, a, b, "abs_of_sum")[3], rtol=1e-5, atol=0)
    assert db.abs().max() > 1e44


@pytest.fixture
def door(monkeypatch):
    """`grkan`'s functions call these kernels: on a GPU as they are, in the interpreter for tensors on the CPU."""
    if INTERPRETED:
        monkeypatch.setitem(dispatch.KERNELS, "cpu", dispatch.Kernel(gpu.forward, gpu.backward))
    with grkan.set_backend("native"):
        yield


def assert_like_the_reference(function, *leaves):
    leaves = [t.detach().to(DEVICE).requires_grad_() for t in leaves]
    y = function(*leaves)
    found = y, *torch.autograd.grad(y.sum(), leaves)  # an expanded gradient
    with grkan.set_backend("reference"):
        exact = [t.detach().double().requires_grad_() for t in leaves]
        wanted = function(*exact)
        wanted = wanted, *torch.autograd.grad(wanted.sum(), exact)
    for actual, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


@needs_triton
@runs_kernels
@pytest.mark.parametrize("layout", ["rows", "every other row", "transposed", "channels first", "channels_last"])
def test_layouts_through_the_door(door, layout):
    x = torch.randn(6, 8, 3, 4, generator=torch.Generator().manual_seed(0))
    x, dim = {
        "rows": (x.flatten(1), -1),
        "every other row": (x.flatten(1)[::2], -1),
        "transposed": (x.flatten(1).T[:, :4], 1),
        "channels first": (x, 1),
        "channels_last": (x.contiguous(memory_format=torch.channels_last), 1),
    }[layout]
    _, _, a, b = inputs((1, 4, 1))
    assert_like_the_reference(lambda *t: grkan.group_rational(*t, channel_dim=dim), x, a, b)


@needs_triton
@runs_kernels
def test_rational_linear_through_the_door(door):
    x, _, a, b = inputs((5, 4, 6))
    weight, bias = torch.randn(7, 25, generator=torch.Generator().manual_seed(1)).split([24, 1], 1)
    assert_like_the_reference(grkan.rational_linear, x.flatten(1), a, b, weight, bias[:, 0])


@needs_triton
@pytest.mark.skipif(INTERPRETED or HAS_GPU, reason="runs the tests above, which run here")
def test_numbers_by_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "pytest",
        "-q",
        "-m",
        "gpu",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
    ]
    command += ["-o", "addopts=", "--import-mode=importlib", "--strict-markers", "-x", str(Path(__file__))]
    root = Path(__file__).parents[2]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=root)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-2000:]
    assert int(result.stdout.rsplit(" passed", 1)[0].split()[-1]) > 70


# Shapes, which need no kernel to run.


@needs_triton
def test_plans():
    """By the shape alone; every scalar belongs to a chunk, the sums stay below 2 % of the traffic."""
    a, b = torch.empty(8, 8), torch.empty(8, 7)
    for dtype, width, vector in [
        (torch.bfloat16, 96, 8),
        (torch.bfloat16, 384, 8),
        (torch.bfloat16, 12, 4),
        (torch.float32, 96, 4),
        (torch.float32, 1023, 1),
        (torch.float64, 24, 2),
    ]:
        for rows in (1, 1000, 2_000_000):
            x = torch.empty(rows, 8, width, dtype=dtype, device="meta")
            programs, (found, groups, units, tiles, chunks), options = gpu.plan(
                x, a, b, "abs_of_sum", width, gradient=True
            )
            assert (found, groups, units * vector, options["VECTOR"]) == (rows, 8, width, vector)
            assert programs == groups * chunks
            lanes = options["LANES"] * tiles
            assert (chunks - 1) * lanes < rows * units <= chunks * lanes
            # What the last lanes' offsets come to fits their integers.
            last = (rows + 1 + lanes // units) * groups * units * vector
            assert options["LONG"] or last < 2**31
            assert rows < 2_000_000 or options["LONG"] == (rows * 8 * width > 2**31 - 10**6)
            if rows >= 1000 and width > 12:
                traffic = x.numel() * 3 * x.itemsize
                assert programs * 16 * (8 + 7) < 0.02 * traffic


@needs_triton
def test_nothing_is_compiled_for_a_shape():
    """Every number of a shape is an ordinary argument, and none of them is looked at by the compiler."""
    if INTERPRETED:
        pytest.skip("the interpreter does not compile")
    for kernel in (gpu.forward_kernel, gpu.backward_kernel, gpu.sum_kernel):
        plain = [p for p in kernel.params if not p.is_constexpr and not p.name.endswith("_ptr")]
        assert plain
        assert all(p.do_not_specialize for p in plain)
        assert not {"rows", "groups", "units", "tiles", "chunks"} & {p.name for p in kernel.params if p.is_constexpr}


# The compiled code.

PROVEN = "3.8."
"""The Triton whose compiler the bars were met with."""


@pytest.fixture
def stats():
    if not HAS_TRITON:
        pytest.skip("Triton is not installed")
    if INTERPRETED:
        pytest.skip("the interpreter does not compile")
    from grkan.bench import kernels

    return kernels.stats


def missed(found):
    """The bars of benchmarks/ that a kernel misses."""
    import bars
    from grkan.bench.report import kernels_as_json

    report = json.loads(json.dumps({"suite": "kernels", **kernels_as_json([found])}))
    return [str(verdict) for verdict in bars.judge(report) if verdict.figure is not None and not verdict.met]


def assert_proven():
    import triton

    if not triton.__version__.startswith(PROVEN):
        pytest.skip(f"the bars were met with Triton {PROVEN}x; this is {triton.__version__}")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("order", [(5, 4), (7, 6)], ids=str)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("kernel", ["forward", "backward"])
def test_bars_of_the_compiled_code(stats, kernel, dtype, order, form):
    assert_proven()
    found = stats("sm_90", kernel, dtype, form, order)
    assert missed(found) == []
    assert found.instructions > 10  # fewer cannot be: the loop would not have been found
    size = 2 if dtype == "bfloat16" else 4
    assert found.bytes - found.sums == size * (2 if kernel == "forward" else 3)


MATRIX = [
    *(("backward with F", dtype, order) for dtype in ("bfloat16", "float32", "float64") for order in ((5, 4), (7, 6))),
    ("backward", "float16", (5, 4)),
    ("forward", "float16", (7, 6)),
    ("forward", "float64", (5, 4)),
    ("backward", "float32", (3, 0)),
]


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize(("kernel", "dtype", "order"), MATRIX, ids=str)
def test_compiles_without_spills(stats, target, kernel, dtype, order):
    """Forms in turn, so that half of the compilations will do."""
    form = FORMS[(MATRIX.index((kernel, dtype, order)) + ord(target[-1])) % 2]
    found = stats(target, kernel, dtype, form, order)
    assert found.atomics == 0
    assert found.barriers == 0
    assert_proven()
    assert missed(found) == []


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_the_sign_of_what_underflows_is_kept(stats, target):
    """A(x) is a product plus 0 that is rounded once: a product alone may be -0, and rounded before, it loses its sign.

    The interpreter cannot tell: it rounds twice. So each scalar of a vector needs such an instruction, and the float64
    path one more.
    """
    from grkan.bench import kernels

    code = kernels.assembly(kernels.compile_kernel(target, "backward", "bfloat16", "abs_of_sum", (5, 4)))
    found = re.findall(
        r"(FFMA|DFMA) \S+, \S+, \S+, RZ ;|v_((?:pk_)?fma_f\d\d) [^,]+, [^,]+, [^,]+, 0(?: op_sel.*)?\n", code
    )
    names = [nvidia or amd for nvidia, amd in found]
    single = names.count("FFMA") + names.count("fma_f32") + 2 * names.count("pk_fma_f32")
    double = names.count("DFMA") + names.count("fma_f64")
    assert double  # Triton 3.6 has both of them twice
    assert single == 8 * double


def test_narrow_vectors_compile(stats):
    found = stats("sm_90", "backward", "bfloat16", "abs_of_sum", (5, 4), 1)
    assert (found.load, found.store) == (16, 16)


# What can go wrong.


@pytest.fixture
def unloaded(monkeypatch):
    """As if no tensor on a GPU had come yet."""
    monkeypatch.setattr(dispatch, "KERNELS", {"cpu": dispatch.REFERENCE})
    monkeypatch.setattr(dispatch, "_gpu_kernel_wanted", False)
    monkeypatch.setattr(dispatch, "_why_no_gpu_kernel", "")
    monkeypatch.setattr(dispatch, "_noticed", set())
    monkeypatch.delitem(sys.modules, "grkan.rational.gpu", raising=False)
    monkeypatch.delattr(sys.modules["grkan.rational"], "gpu", raising=False)


def broken_triton(kind):
    if kind == "missing":
        return None  # `import` then raises ModuleNotFoundError
    module = types.ModuleType("triton")
    module.__version__ = "2.3.1" if kind == "old" else "3.8.0"
    return module


PROBLEMS = [
    ("missing", "Triton is missing; version 3.6 or newer is needed"),
    ("old", "Triton is version 2.3.1, and 3.6 or newer is needed"),
    ("broken", "Triton does not work: .*; version 3.6 or newer is needed"),
]


@pytest.mark.parametrize(("kind", "message"), PROBLEMS)
def test_a_triton_that_cannot_be_used_is_named_and_replaced(unloaded, monkeypatch, kind, message):
    monkeypatch.setitem(sys.modules, "triton", broken_triton(kind))
    for name in [name for name in sys.modules if name.startswith("triton.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.warns(RuntimeWarning, match=f"no kernel for the GPU.*{message}.*pip install"):
        dispatch.check_backend("cuda")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.kernel_for("cuda") is dispatch.REFERENCE
    with grkan.set_backend("native"), pytest.raises(RuntimeError, match=f"on device cuda.*{message}.*pip install"):
        dispatch.check_backend("cuda")
    if kind == "missing":  # without the kernel for the CPU, too, nothing is left
        monkeypatch.setattr(dispatch, "KERNELS", {})
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        with pytest.raises(RuntimeError, match=f"not available.*for the GPU, {message}.*pip install"):
            grkan.set_backend("native")


@needs_triton
def test_a_kernel_that_does_not_run_is_named_and_replaced(unloaded, monkeypatch):
    """No C compiler, for example, without which Triton cannot launch anything."""
    from grkan.rational import gpu

    def fail():
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(gpu, "try_out", fail)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.warns(RuntimeWarning, match="Triton does not work: RuntimeError: Failed to find C compiler"):
        dispatch.check_backend("cuda")
    assert "cuda" not in dispatch.KERNELS


@needs_triton
def test_a_kernel_that_fails_once_is_tried_again(unloaded, monkeypatch):
    """While another process writes into Triton's cache, for example."""
    from grkan.rational import gpu

    failures = [FileNotFoundError("kernel.ttir.tmp")]

    def try_out():
        if failures:
            raise failures.pop()

    monkeypatch.setattr(gpu, "try_out", try_out)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dispatch.check_backend("cuda")
    assert dispatch.KERNELS["cuda"].forward is gpu.forward


def test_import_does_not_load_triton():
    # Of what timm imports, some parts import Triton.
    program = "import sys; sys.modules['timm'] = None; import grkan; "
    program += "print('triton' in sys.modules, 'grkan.rational.gpu' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False", "False"]


# PyTorch's compiler, with tensors on a GPU that is not there.


class Layer(torch.nn.Module):
    """Of parameters alone: `grkan`'s layers look at their initial values, of which a fake tensor has none."""

    def __init__(self):
        super().__init__()
        shapes = {"a": (4, 6), "b": (4, 4), "weight": (5, 8)}
        self.c = torch.nn.ParameterDict({name: torch.empty(shape, device="cuda") for name, shape in shapes.items()})

    def forward(self, x):
        return grkan.rational_linear(grkan.group_rational(x, self.c.a, self.c.b), self.c.a, self.c.b, self.c.weight)


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="not about numbers")
def test_export_for_a_gpu():
    with FakeTensorMode():
        model, x = Layer(), torch.empty(3, 8, device="cuda")
        assert model(x).device.type == "cuda"
        program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("rows")},))
    names = [str(node.target) for node in program.graph.nodes]
    assert sum("grkan" in name for name in names) == 2
    (output,) = (node for node in program.graph.nodes if node.op == "output")
    assert output.args[0][0].meta["val"].device.type == "cuda"


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="not about numbers")
def test_compile_for_a_gpu_once_and_without_a_break():
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    with FakeTensorMode(), torch.no_grad():
        a, b = torch.empty(4, 6, device="cuda"), torch.empty(4, 4, device="cuda")
        compiled = torch.compile(grkan.group_rational, fullgraph=True, backend=backend, dynamic=True)
        for rows in (3, 5, 7):
            assert compiled(torch.empty(rows, 8, device="cuda"), a, b).shape == (rows, 8)
    assert len(graphs) == 1
    assert any("grkan" in str(node.target) for node in graphs[0].graph.nodes)


# On a GPU.


@runs_on_a_gpu
@pytest.mark.parametrize("form", FORMS)
def test_gradcheck_through_the_door(form):
    torch.manual_seed(5)
    x = torch.randn(2, 6, dtype=torch.float64, device="cuda", requires_grad=True)
    a, b = (torch.randn(3, k, dtype=torch.float64, device="cuda", requires_grad=True) for k in (6, 4))
    with grkan.set_backend("native"):
        assert torch.autograd.gradcheck(lambda *t: grkan.group_rational(*t, form=form), (x, a, b))
        assert torch.autograd.gradgradcheck(lambda *t: grkan.group_rational(*t, form=form), (x, a, b))


@runs_on_a_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_each_time(dtype):
    """More programs than a GPU has room for, so that their order is not always the same."""
    arguments = inputs((32 * 197, 8, 384), dtype=dtype)
    first = run(*arguments, "abs_of_sum")
    for _ in range(5):
        assert all(torch.equal(t, u) for t, u in zip(run(*arguments, "abs_of_sum"), first, strict=True))


@runs_on_a_gpu
def test_more_than_2_to_the_31_scalars():
    if torch.cuda.mem_get_info()[0] < 14 * 2**30:
        pytest.skip("needs 14 GiB of the GPU's memory")
    x = torch.zeros(2**31 // 96 + 10, 96, dtype=torch.bfloat16, device="cuda")
    x[-1] = torch.linspace(-3, 3, 96)
    _, _, a, b = inputs((1, 8, 12))
    y = grkan.group_rational(x, a, b)
    torch.testing.assert_close(y[-1:], grkan.group_rational(x[-1:], a, b))
    del y
    dx, da, _, _ = gpu.backward(x, x, a, b, "abs_of_sum", 12, False)
    last = gpu.backward(x[-1:], x[-1:], a, b, "abs_of_sum", 12, False)
    torch.testing.assert_close(dx[-1:], last[0])
    torch.testing.assert_close(da, last[1])


@runs_on_a_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_the_second_gpu():
    x, grad, a, b = inputs((40, 2, 24))
    first = run(x, grad, a, b, "abs_of_sum")
    second = run(*(t.to("cuda:1") for t in (x, grad, a, b)), "abs_of_sum")
    for t, u in zip(first, second, strict=True):
        assert u.device.index == 1
        torch.testing.assert_close(t, u.to("cuda:0"))


@runs_on_a_gpu
def test_compiled_on_a_gpu():
    compiled = torch.compile(grkan.group_rational, fullgraph=True)
    for rows in (3, 5, 7):
        x, _, a, b = inputs((rows, 4, 24))
        x = x.flatten(1).requires_grad_()
        torch.testing.assert_close(compiled(x, a, b), grkan.group_rational(x, a, b))


@runs_on_a_gpu
def test_a_short_training_run():
    """The same layer under autocast on the GPU and in float32 on the CPU: the losses fall alike."""
    torch.manual_seed(0)
    layer = grkan.GRKAN(32, 64)
    x, goal = torch.randn(256, 32), torch.randn(256, 32)
    losses = {}
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = grkan.GRKAN(32, 64).to(device)
        model.load_state_dict(layer.state_dict())
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(50):
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                loss = (model(x.to(device)) - goal.to(device)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses[device] = loss.item()
    assert losses["cpu"] < 0.8
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=0.1)
