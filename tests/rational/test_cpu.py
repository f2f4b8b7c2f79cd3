"""The C++ kernel: what the grid of `test_op.py` and the exact arithmetic of `test_reference.py` do not ask."""

import ctypes
import itertools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from grkan.rational import cpu, dispatch
from grkan.rational.reference import FORMS, rational, rational_backward

pytestmark = pytest.mark.skipif("cpu" not in dispatch.KERNELS, reason="the CPU kernel is not built")

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12, torch.bfloat16: 2**-7, torch.float16: 2**-9}
with_every_instruction_set = pytest.mark.usefixtures("instruction_set")
# rows, groups, width: vectors of one group, of several, and partial ones; tiles of rows, and of parts of a row.
SIZES = [
    (1, 1, 1),
    (5, 8, 1),
    (3, 5, 7),
    (197, 8, 24),
    (300, 8, 96),
    (3, 2, 1023),
    (9, 192, 1),
    (1, 3, 100_001),
    (2, 4, 40_000),
]


def inputs(size, order=(5, 4), dtype=torch.float32, seed=0):
    """x, grad, numerator, denominator; coefficients of the size that fits have, so that no sum is all cancellation."""
    rows, groups, width = size
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    wide = torch.promote_types(dtype, torch.float32)
    x, grad = draw(rows, groups, width).to(dtype), draw(rows, groups, width).to(dtype)
    return x, grad, draw(groups, order[0] + 1).to(wide), draw(groups, order[1]).to(wide)


def run(x, grad, a, b, form):
    """y, dx, da, db of the kernel."""
    width = x.shape[-1]
    dx, da, db, y = cpu.backward(grad, x, a, b, form, width, True)
    torch.testing.assert_close(cpu.forward(x, a, b, form, width), y, equal_nan=True)
    return y, dx, da, db


def assert_right(x, grad, a, b, form):
    y, dx, da, db = run(x, grad, a, b, form)
    exact = [t.double() for t in (x, a, b)]
    wanted_dx, wanted_da, wanted_db = rational_backward(grad.double(), *exact, form)
    rtol = TOLERANCE[x.dtype]
    # An infinity of the narrower type is where float64 has a large number.
    torch.testing.assert_close(y, rational(*exact, form).to(x.dtype), rtol=rtol, atol=rtol, equal_nan=True)
    torch.testing.assert_close(dx, wanted_dx.to(x.dtype), rtol=rtol, atol=rtol, equal_nan=True)
    for actual, wanted in ((da, wanted_da), (db, wanted_db)):
        if wanted.numel():
            scale = max(1.0, wanted.abs().max().item())
            torch.testing.assert_close(actual.double() / scale, wanted / scale, rtol=2e-5, atol=2e-5)


@with_every_instruction_set
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_way_to_cut_a_tensor(size, form, dtype):
    assert_right(*inputs(size, dtype=dtype), form)


EXTREMES = [0.0, -0.0, 1e-45, -1e-45, 1e-38, 1e-30, -1e-30, 9e3, -6e5, 1e7, -1e20, 3e38, torch.inf, -torch.inf]


@with_every_instruction_set
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("order", [(5, 4), (7, 6), (3, 2), (4, 5)], ids=str)
@pytest.mark.parametrize("size", [(40, 8, 24), (3, 2, 1023), (30, 7, 1)], ids=str)
def test_extremes_among_others(size, order, form, dtype):
    """They take the slow path; what is beside them in a vector does not change."""
    x, grad, a, b = inputs(size, order, dtype)
    at = torch.randperm(x.numel(), generator=torch.Generator().manual_seed(1))[: 4 * len(EXTREMES)]
    x.view(-1)[at] = torch.tensor(EXTREMES, dtype=torch.float64).repeat(4).to(dtype)
    # The terms of large x would drown the others in the sums.
    grad.view(-1)[at] *= torch.where(x.view(-1)[at].abs() > 1e3, 0.0, 1.0).to(dtype)
    assert_right(x, grad, a, b, form)
    grad.view(-1)[at] = 1.0
    y, dx, _, _ = run(x, grad, a, b, form)
    exact = [t.double() for t in (x, a, b)]
    wanted = rational(*exact, form), rational_backward(grad.double(), *exact, form)[0]
    for actual, expected in zip((y, dx), wanted, strict=True):
        rtol = TOLERANCE[dtype]
        torch.testing.assert_close(actual, expected.to(dtype), rtol=rtol, atol=rtol, equal_nan=True)


@with_every_instruction_set
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_nan_stays_alone(form, dtype):
    x, grad, a, b = inputs((20, 8, 24), dtype=dtype)
    clean = run(x, grad, a, b, form)
    x[3, 2, 5] = torch.nan
    y, dx, da, db = run(x, grad, a, b, form)
    for actual, expected in ((y, clean[0]), (dx, clean[1])):
        assert actual[3, 2, 5].isnan()
        expected[3, 2, 5] = torch.nan
        torch.testing.assert_close(actual, expected, equal_nan=True)
    assert da[2].isnan().all()
    assert db[2].isnan().all()
    others = [g for g in range(8) if g != 2]
    torch.testing.assert_close(da[others], clean[2][others])


@with_every_instruction_set
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [65536, 65535])  # even widths of bfloat16 are read in pairs
def test_every_number_of_16_bits_is_read_and_written(width, dtype):
    x = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)[:width].reshape(1, 1, -1)
    a, b = torch.tensor([[0.0, 1.0]]), torch.zeros(1, 0)
    y = cpu.forward(x, a, b, "abs_of_sum", width)
    torch.testing.assert_close(y, x, rtol=0, atol=0, equal_nan=True)


@with_every_instruction_set
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [65536, 65535])
def test_rounding_to_16_bits_is_to_the_nearest_even(width, dtype):
    x = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)[:width].reshape(1, 1, -1)
    x = torch.where(x.isfinite(), x, 1.0)
    for factor in (0.7, 1.0009765625, 1.00390625, 2.0**-20):
        y = cpu.forward(x, torch.tensor([[0.0, factor]]), torch.zeros(1, 0), "abs_of_sum", width)
        assert torch.equal(y, (x.float() * factor).to(dtype))


@with_every_instruction_set
@pytest.mark.parametrize("size", [(8 * 197, 8, 24), (8 * 197, 8, 96), (1, 3, 100_001), (4, 2, 40_000)], ids=str)
def test_the_same_bits_with_any_number_of_threads(size):
    arguments = inputs(size)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            found.append(run(*arguments, "abs_of_sum"))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(t, first) for t, first in zip(other, found[0], strict=True))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sums_of_five_million_terms(dtype, form, instruction_sets):
    """Within 1e-6 of the sum of the absolute terms."""
    x, grad, a, b = inputs((48_000, 1, 105), dtype=dtype)
    found = {}
    for name, computing in instruction_sets.items():
        with computing():
            found[name] = cpu.backward(grad, x, a, b, form, 105, False)[1:3]
    a, b = a.double(), b.double()
    exact = bounds = torch.zeros(10, dtype=torch.float64)
    for rows, its_grad in zip(x.split(2000), grad.split(2000), strict=True):  # all at once waits for memory
        rows, its_grad = rows.double(), its_grad.double()
        exact = exact + torch.cat(rational_backward(its_grad, rows, a, b, form)[1:], 1)[0]
        # With |grad|, |x| and |F| every term is at least its absolute value.
        of_a = its_grad.abs() * rational(rows, torch.ones(1, 1).double(), b, form)
        of_b = of_a * rational(rows, a, b, form).abs()
        powers = [rows.abs() ** k for k in range(6)]
        terms = [of_a * power for power in powers] + [of_b * power for power in powers[1:5]]
        bounds = bounds + torch.stack([term.sum() for term in terms])
    for name, gradients in found.items():
        assert ((torch.cat(gradients, 1)[0] - exact).abs() <= 1e-6 * bounds).all(), name


@with_every_instruction_set
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(32, 1, 1024), (1, 1, 40_000), (1365, 1, 24), (400, 8, 96)], ids=str)
def test_sums_of_equal_terms(shape, dtype):
    """Their rounding errors all have one sign. With F = a_0 the terms of da_0 are the gradients themselves."""
    x = torch.zeros(shape, dtype=dtype)
    groups, count = shape[1], shape[0] * shape[2]
    a, b = torch.ones(groups, 6), torch.zeros(groups, 4)
    for value in torch.linspace(1, 2, 61).tolist():
        grad = torch.full_like(x, value)
        _, da, _ = cpu.backward(grad, x, a, b, "abs_of_sum", shape[2], False)[:3]
        exact = count * grad.view(-1)[0].double()
        assert ((da[:, 0] - exact).abs() <= 1e-6 * exact).all()


ZERO_OR_NOT = [list(pattern) for pattern in itertools.product([0.0, 0.5], repeat=4)]


@with_every_instruction_set
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tiny", [0.0, 1e-25, 1e-35])
def test_zeros_beside_any_number(tiny, form, dtype):
    """An x that the vectors leave must not take those at 0 with it, whichever coefficients of A are 0 or nearly so."""
    x = torch.tensor([0.0, -0.0, 1.0, -0.5, 0.0, 3.0, 0.0, 1.0] * 4, dtype=dtype)
    grad = torch.linspace(1, 3, 32).to(dtype)
    a = torch.tensor([[0.5, 0.9, -0.4, 0.3, 0.2, 0.05]])
    for zero_or_not in ZERO_OR_NOT:
        b = torch.tensor([[value or tiny * (-1) ** j for j, value in enumerate(zero_or_not)]])
        dx, da, db = rational_backward(*(t.double() for t in (grad[:, None, None], x[:, None, None], a, b)), form)
        for other in (1e-40, 1e-9, -1e-20, 3e4, -1e6, 1e30, torch.inf, torch.nan):
            beside = torch.tensor([other, 0.0, other], dtype=dtype)
            everything, gradients = torch.cat([x, beside]), torch.cat([grad, torch.tensor([0.0, 1.0, 0.0]).to(dtype)])
            _, got_dx, got_da, got_db = run(everything[None, None], gradients[None, None], a, b, form)
            tolerance = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
            torch.testing.assert_close(got_dx[0, 0, :-3], dx[:, 0, 0].to(dtype), **tolerance)
            torch.testing.assert_close(got_dx[0, 0, -2], got_dx[0, 0, 0] / grad[0], **tolerance)
            if not torch.tensor(other, dtype=dtype).isnan():
                expected_da = da + torch.tensor([1.0, 0, 0, 0, 0, 0])
                torch.testing.assert_close(got_da.double(), expected_da, rtol=2e-5, atol=2e-5)
                torch.testing.assert_close(got_db.double(), db, rtol=2e-5, atol=2e-5)


@with_every_instruction_set
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("order", [(5, 4), (7, 6), (3, 4), (5, 0)], ids=str)
def test_small_gradients_of_large_x(order, form, dtype):
    """g / Q may be no number of float32 where dx, da and db are."""
    a, b = torch.linspace(0.2, 0.9, order[0] + 1)[None], torch.linspace(0.9, 0.2, order[1])[None]
    for size, g in itertools.product((1.0, 30.0, 300.0, 5e3, 5e4, 5e5), (1e-12, 1e-20, 1e-25, 1e-30, 1e-37)):
        x, grad = (torch.tensor([[[value]]]).to(dtype) for value in (size, g))
        wanted = rational_backward(*(t.double() for t in (grad, x, a, b)), form)
        for actual, exact in zip(run(x, grad, a, b, form)[1:], wanted, strict=True):
            rtol = 2**-7 if actual.dtype == torch.bfloat16 else 1e-5
            torch.testing.assert_close(actual.double() / g, exact / g, rtol=rtol, atol=1e-38 / g)


@with_every_instruction_set
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_sums_that_overflow_are_infinite(form, dtype):
    """Not NaN: neither by inf - inf of the lanes nor by 0 inf. What overflows float32 on the way alone is a number."""
    x = torch.tensor([-2.0, 2.0, 1.0, 0.0] * 64, dtype=dtype).view(1, 1, -1)
    wide = torch.promote_types(dtype, torch.float32)
    a, b = torch.tensor([[1.0, 0.0, 0.0]], dtype=wide), torch.tensor([[0.5, 0.25]], dtype=wide)
    large = torch.finfo(wide).max / 4
    grad = torch.zeros_like(x)
    grad[x == 1], grad[0, 0, 0] = large, -large
    _, da, db = run(x, grad, a, b, form)[1:]
    assert da.tolist() == [[torch.inf] * 3]
    assert db.tolist() == [[-torch.inf] * 2]
    if dtype != torch.float64:
        grad = (torch.linspace(-1, 1.5, x.numel()) * 2e36).to(dtype).view_as(x)
        exact = [t.double() for t in (grad, x, a, b)]
        for actual, expected in zip(run(x, grad, a, b, form)[2:], rational_backward(*exact, form)[1:], strict=True):
            torch.testing.assert_close(actual.double() / 1e38, expected / 1e38, rtol=1e-5, atol=1e-6)


@with_every_instruction_set
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(37, 4, 16), (37, 3, 7), (37, 8, 24), (3, 1, 1000)], ids=str)
def test_the_same_bits_at_any_address(size, dtype):
    x, grad, a, b = inputs(size, dtype=dtype)
    expected = run(x, grad, a, b, "abs_of_sum")
    for offset in range(1, 17):
        moved = [
            torch.empty(t.numel() + 64, dtype=dtype)[k : k + t.numel()].view_as(t).copy_(t)
            for t, k in ((x, offset), (grad, 3 * offset % 17))
        ]
        for actual, wanted in zip(run(*moved, a, b, "abs_of_sum"), expected, strict=True):
            assert torch.equal(actual, wanted)


@with_every_instruction_set
@pytest.mark.parametrize("zero", [0.0, -0.0])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("order", [(5, 4), (7, 6), (2, 3)], ids=str)
def test_sign_of_both_zeros_is_plus_one(order, form, zero):
    """At b = 0 the derivative with respect to b_j is -x P |x|^j or -P x^j, as for b slightly above zero."""
    x, grad, a, _ = inputs((16, 4, 24), order)
    b = torch.full((4, order[1]), zero)
    x[0, 0, :2] = torch.tensor([0.0, -0.0])
    assert_right(x, grad, a, b, form)


def test_mistakes_in_calling_the_operators_do_not_reach_memory():
    x, grad, a, b = inputs((3, 4, 8))
    x, grad = x.flatten(1), grad.flatten(1)
    forward, backward = torch.ops.grkan.group_rational, torch.ops.grkan.group_rational_backward
    for arguments, message in [
        ((x.long(), a, b), "x must be float16"),
        ((x, a[:2], b), "same number of rows"),
        ((x, a[:, :0], b), "numerator must have shape"),
        ((x, a[:0], b[:0]), "numerator must have shape"),
        ((x, a[:1], b[:0]), "denominator must have shape"),
        ((x, a, b[0]), "denominator must have shape"),
        ((x[:, :30], a, b), "divisible by the number of groups"),
    ]:
        with pytest.raises(ValueError if "x must be" not in message else TypeError, match=message):
            forward(*arguments, "abs_of_sum", -1)
        with pytest.raises(ValueError if "x must be" not in message else TypeError, match=message):
            backward(grad, *arguments, "abs_of_sum", -1)
    for bad in (grad[:2], grad.double(), grad[:, :8]):
        with pytest.raises(ValueError, match="grad must be like x, "):
            backward(bad, x, a, b, "abs_of_sum", -1)
    # Not even tensors that lie otherwise do.
    y, gradients = forward(x, a, b, "abs_of_sum", -1), backward(grad, x, a, b, "abs_of_sum", -1)
    odd = [torch.stack([t, t], -1)[..., 0] for t in (grad, x, a, b)]
    torch.testing.assert_close(forward(*odd[1:], "abs_of_sum", -1), y)
    torch.testing.assert_close(backward(*odd, "abs_of_sum", -1), gradients)


def test_mistakes_in_calling_the_library_do_not_reach_memory():
    """As far as sizes can tell; with memory that there is, lest a mistake of the library's go unnoticed."""
    room = torch.zeros(1000)
    good = {"threads": None, "type": 0, "scalars": 96, "width": 8, "absolute": 0}
    good |= {"a": room.data_ptr(), "a_type": 0, "a_rows": 4, "a_columns": 6}
    good |= {"b": room.data_ptr(), "b_type": 0, "b_rows": 4, "b_columns": 4}
    forward, backward = [room.data_ptr()] * 2, [room.data_ptr()] * 6
    for change, message in [
        ({}, None),
        ({"type": 4}, "x must be float16"),
        ({"type": -1}, "x must be float16"),
        ({"a_type": 2}, "float32 or float64"),
        ({"a_rows": 2}, "same number of rows"),
        ({"a_columns": 0}, "numerator must have a column"),
        ({"b_columns": -1}, "denominator must not have"),
        ({"a_rows": 0, "b_rows": 0}, "must have a row"),
        ({"a_rows": 1, "b_rows": 0}, "must have a row"),
        ({"a_rows": 2**62, "b_rows": 2**62}, "multiple of groups"),
        ({"width": 2**62}, "multiple of groups"),
        ({"width": 2**63 - 1}, "multiple of groups"),
        ({"width": -8}, "multiple of groups"),
        ({"width": 5}, "multiple of groups"),
        ({"width": 0}, "multiple of groups"),
        ({"scalars": -96}, "multiple of groups"),
        ({"a": None}, "no memory"),
        ({"b": None}, "no memory"),
    ]:
        for function, memory in ((cpu._forward, forward), (cpu._backward, backward)):
            problem = function(*(good | change).values(), *memory)
            assert problem is None if message is None else message in problem.decode()
    for k in range(2):
        memory = [None if i == k else place for i, place in enumerate(forward)]
        assert b"no memory" in cpu._forward(*good.values(), *memory)
    for k in range(5):  # the sixth, y, may be missing
        memory = [None if i == k else place for i, place in enumerate(backward)]
        assert b"no memory" in cpu._backward(*good.values(), *memory)


def test_threads_that_fail_are_reported():
    room = torch.zeros(1000)

    @ctypes.CFUNCTYPE(ctypes.c_int32, *[ctypes.c_int64] * 3, ctypes.c_void_p, ctypes.c_void_p)
    def fail(begin, end, grain, body, data):
        return 1

    x = torch.zeros(200_000)
    coefficients = (room.data_ptr(), 0, 1, 6, room.data_ptr(), 0, 1, 4)
    threads = ctypes.cast(fail, ctypes.c_void_p)
    problem = cpu._forward(threads, 0, x.numel(), x.numel(), 0, *coefficients, x.data_ptr(), x.data_ptr())
    assert problem == b"the threads that were to do the work did not"


def test_a_library_of_another_version_is_refused(monkeypatch):
    monkeypatch.setattr(cpu, "_INTERFACE", 0)
    with pytest.raises(OSError, match="was built for another version of grkan"):
        cpu.load()
    monkeypatch.setattr(cpu, "LIBRARY", Path(torch._C.__file__))
    with pytest.raises(OSError, match="grkan_interface"):
        cpu.load()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_after_a_fork():
    """On one thread, for PyTorch's others are not in the child; the kernel adds nothing that could break."""
    program = (
        "import os, torch, grkan; torch.set_num_threads(1)\n"
        "x, a, b = torch.randn(3000, 64), torch.randn(8, 6), torch.randn(8, 4)\n"
        "y = grkan.group_rational(x, a, b)\n"
        "child = os.fork()\n"
        "if child == 0: os._exit(0 if torch.equal(grkan.group_rational(x, a, b), y) else 1)\n"
        "print(os.waitpid(child, 0)[1])\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert result.stdout == "0\n"


def test_many_python_threads_at_once():
    arguments = inputs((64, 8, 24))
    wanted = run(*arguments, "abs_of_sum")
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(lambda _: run(*arguments, "abs_of_sum"), range(64)):
            assert all(torch.equal(t, first) for t, first in zip(found, wanted, strict=True))


def test_every_instruction_set_is_another(instruction_sets):
    """Their vectors have other lengths, so sums are rounded otherwise."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("this machine has a lesser instruction set itself")
    sums = set()
    for computing in instruction_sets.values():
        with computing():
            sums.add(tuple(run(*inputs((300, 8, 96)), "abs_of_sum")[2].flatten().tolist()))
    assert len(sums) == len(instruction_sets) == 3
