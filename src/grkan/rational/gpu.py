"""The Triton kernels, in the form that `op.py` wants: float16 to float64 on a GPU, any order, both forms, any width.

The scalars of a group are rows x width. They are walked in vectors of the largest power of two of scalars, up to 16
bytes, that divides the width. A lane takes one vector at a time, a tile is one vector for each lane, and a program,
which is a single warp, walks a chunk of successive tiles. The length of a chunk follows from the shape alone, and its
sums for the coefficients' gradients go to memory, where a second kernel adds them in a fixed order: no atomics, and the
same bits each time, whatever the number of multiprocessors.

Shapes are ordinary arguments: a new batch, image or layer needs no compilation. What is compiled anew is another dtype,
order, form or vector, and an index of 64 bits where a tensor needs one.

Arithmetic is float64 for float64 and float32 otherwise. The loop that does the work knows nothing of `reference.py`'s
care for extreme x: it keeps the largest |x| that each lane has met, and where one turns out to be infinite, NaN, or so
large that a power of it may overflow, the program does its chunk once more in float64.
"""

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..errors import GrkanRuntimeError

VECTOR_BYTES = 16
"""What one instruction reads or writes at most."""

SHORTEST_CHUNK, LONGEST_CHUNK, PROGRAMS = 2048, 4096, 4096
"""Scalars of a chunk: x is cut into 4096 chunks, about what a GPU works on at once, unless they get too short or too
long. The sums of a short one are below 2 % of what it reads and writes for order (7, 6). In a long one a lane adds at
most 32 sums, one of each vector, so float32 keeps them to 1e-6 even where every term is rounded to the same side."""

SUM_BLOCK = 1024
"""Sums that the second kernel adds side by side."""

SAFE_BITS = tl.constexpr(96)
"""|x|^m and |x|^n may reach 2^96 in float32, so that 2^31 remain for the coefficients."""

SMALL_B = tl.constexpr(2.0**-64)
"""A smaller |b_1| may leave the sign of A(x) near 0 to the other coefficients, where float32 underflows."""


# Where things are. An offset counts vectors from the start of x, so every address is a multiple of a vector's size.


@triton.jit
def _first(chunk, tiles, group, groups, units, LANES: tl.constexpr, LONG: tl.constexpr):
    """The offset of each lane's first vector, and the vector's number within its row of the group."""
    if LONG:
        chunk, group = chunk.to(tl.int64), group.to(tl.int64)
        groups, units = groups.to(tl.int64), units.to(tl.int64)
    number = chunk * tiles * LANES + tl.arange(0, LANES)
    row = number // units
    column = number - row * units
    return row * (groups * units) + group * units + column, column


@triton.jit
def _next(offset, column, groups, units, LANES: tl.constexpr):
    """The same for the vector LANES further on; a division at each step would cost more than these few additions."""
    groups, units = groups.to(offset.dtype), units.to(offset.dtype)
    rows = LANES // units
    columns = LANES - rows * units
    column += columns
    wraps = column >= units
    offset += rows * groups * units + columns + tl.where(wraps, (groups - 1) * units, 0)
    return offset, tl.where(wraps, column - units, column)


@triton.jit
def _end(rows, groups, units, LONG: tl.constexpr):
    """What the offset of every vector of x is less than, and that of every vector behind the last row is not."""
    if LONG:
        rows, groups, units = rows.to(tl.int64), groups.to(tl.int64), units.to(tl.int64)
    return rows * groups * units


@triton.jit
def _addresses(offset, VECTOR: tl.constexpr):
    return (offset * VECTOR)[:, None] + tl.arange(0, VECTOR)[None, :]


@triton.jit
def _split(vectors, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """[LANES, VECTOR] -> a tuple of VECTOR tensors [LANES], in an order that `_join` knows; all within a lane."""
    if VECTOR == 1:
        return (tl.reshape(vectors, [LANES]),)
    else:
        even, odd = tl.split(tl.reshape(vectors, [LANES, VECTOR // 2, 2]))
        return _split(even, LANES, VECTOR // 2) + _split(odd, LANES, VECTOR // 2)


@triton.jit
def _join(scalars, LANES: tl.constexpr, VECTOR: tl.constexpr, FIRST: tl.constexpr):
    """The inverse of `_split`, of the VECTOR tensors from FIRST on."""
    if VECTOR == 1:
        return tl.reshape(scalars[FIRST], [LANES, 1])
    else:
        even = _join(scalars, LANES, VECTOR // 2, FIRST)
        odd = _join(scalars, LANES, VECTOR // 2, FIRST + VECTOR // 2)
        return tl.reshape(tl.join(even, odd), [LANES, VECTOR])


# The function, for any shape of x.


@triton.jit
def _coefficients(pointer, COUNT: tl.constexpr, ABSOLUTE: tl.constexpr, DTYPE: tl.constexpr):
    """The COUNT scalars at a pointer, each a value of its own."""
    values = ()
    for i in tl.static_range(COUNT):
        value = tl.load(pointer + i).to(DTYPE)
        if ABSOLUTE:
            value = tl.abs(value)
        values = values + (value + 0.0,)  # +0 for both zeros, whose sign A takes on
    return values


@triton.jit
def _horner(c, x, COUNT: tl.constexpr):
    """c[0] + c[1] x + ... of COUNT >= 1 coefficients, and the derivative."""
    value = tl.zeros_like(x) + c[COUNT - 1]
    slope = tl.zeros_like(x)
    for k in tl.static_range(1, COUNT):
        if k == 1:
            slope = value
        else:
            slope = tl.fma(slope, x, value)
        value = tl.fma(value, x, c[COUNT - 1 - k])
    return value, slope


@triton.jit
def _inverse(q):
    """1 / q for q >= 1. Two instructions and 3 ulp, where a division of float32 takes seven."""
    if q.dtype == tl.float64:
        return 1.0 / q
    else:
        root = tl.rsqrt(q)
        return root * root


@triton.jit
def _sign_bit(x):
    """As an integer of the size of x, all other bits zero."""
    if x.dtype == tl.float64:
        return x.to(tl.int64, bitcast=True) & -(2**63)
    else:
        return x.to(tl.int32, bitcast=True) & -(2**31)


@triton.jit
def _flip(x, sign):
    if x.dtype == tl.float64:
        return (x.to(tl.int64, bitcast=True) ^ sign).to(tl.float64, bitcast=True)
    else:
        return (x.to(tl.int32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)


@triton.jit
def _value(x, a, b, M: tl.constexpr, N: tl.constexpr, ABSOLUTE: tl.constexpr):
    """F(x)."""
    value, _ = _horner(a, x, M + 1)
    if N > 0:
        t = tl.abs(x) if ABSOLUTE else x
        last, _ = _horner(b, t, N)
        value *= _inverse(1.0 + tl.abs(last * t))
    elif M == 0:
        value += 0.0 * x  # NaN stays NaN
    return value


@triton.jit
def _gradient(g, x, a, b, sums, M: tl.constexpr, N: tl.constexpr, ABSOLUTE: tl.constexpr):
    """dx, F(x), and sums with the terms of da and db added; b stands for |b| in the form sum_of_abs.

    With r = 1 / Q and v = -s F: da_i += g (r x^i), db_j += g v (r x^j), dx = g (r (P' + v A')). Products in this order
    underflow no sooner than their results; g / Q would. Empty sums start with these terms.
    """
    value, slope = _horner(a, x, M + 1)
    if N > 0:
        t = tl.abs(x) if ABSOLUTE else x
        last, of_last = _horner(b, t, N)
        # Fused, so that what underflows keeps its sign, and an exact zero is +0, whose sign is +1 by convention.
        inner = tl.fma(last, t, 0.0)
        of_inner = tl.fma(of_last, t, last)
        inverse = _inverse(1.0 + tl.abs(inner))
        value *= inverse
        if ABSOLUTE:
            v = -value
            sign = _sign_bit(x + 0.0)
            odd = _flip(v, sign)  # for the odd powers of |x|, of which the sums below have those of x
            slope = tl.fma(odd, of_inner, slope)
            odd_gv = g * odd
        else:
            v = _flip(-value, _sign_bit(inner))
            slope = tl.fma(v, of_inner, slope)
            odd_gv = g * v
        gv = _flip(odd_gv, sign) if ABSOLUTE else odd_gv
        slope *= inverse
        term = inverse
        added = (_plus(term, g, sums, 0),)
    else:
        gv, odd_gv = g, g
        if M == 0:
            value += 0.0 * x
        term = x * 0.0 + 1.0
        added = (g + sums[0],) if len(sums) > 0 else (g,)
    for i in tl.static_range(1, M + 1):
        term *= x
        added = added + (_plus(term, g, sums, i),)
    if N > 0:
        term = inverse
    for j in tl.static_range(1, N + 1):
        term *= x  # the same products again, which are computed once
        if j % 2 == 1:
            added = added + (_plus(term, odd_gv, sums, M + j),)
        else:
            added = added + (_plus(term, gv, sums, M + j),)
    return g * slope, value, added


@triton.jit
def _plus(x, y, sums, AT: tl.constexpr):
    """The product x y, added to one of the sums if there are any."""
    if len(sums) > 0:
        return tl.fma(x, y, sums[AT])
    else:
        return x * y


@triton.jit
def _zeros(COUNT: tl.constexpr, LANES: tl.constexpr, DTYPE: tl.constexpr):
    values = ()
    for _ in tl.static_range(COUNT):
        values = values + (tl.zeros([LANES], DTYPE),)
    return values


@triton.jit
def _add(first, second, COUNT: tl.constexpr):
    values = ()
    for i in tl.static_range(COUNT):
        values = values + (first[i] + second[i],)
    return values


@triton.jit
def _narrow(x, DTYPE: tl.constexpr):
    """float64 to what is stored; there is no instruction from it to 16 bits."""
    if DTYPE == tl.float64:
        return x
    else:
        return x.to(tl.float32).to(DTYPE)


# The range of float32, and infinity.


@triton.jit
def _larger(largest, x):
    return tl.maximum(largest, tl.abs(x), propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _exceeds(largest, M: tl.constexpr, N: tl.constexpr):
    """Whether some lane has met what the arithmetic of `largest` is not made for: NaN, infinity, or a too large x."""
    if largest.dtype == tl.float64:
        limit: tl.constexpr = 1.7976931348623157e308
    else:
        limit: tl.constexpr = 2.0 ** (SAFE_BITS // max(M, N, 1))
    return tl.max((largest <= limit).to(tl.int32) ^ 1, 0) > 0


@triton.jit
def _sign_is_open(b, N: tl.constexpr):
    """Whether other coefficients than b_1 decide the sign of A(x) near 0; form abs_of_sum."""
    others = False
    for j in tl.static_range(1, N):
        others = others | (b[j] != 0)
    return (tl.abs(b[0]) < SMALL_B) & (others | (b[0] != 0))


@triton.jit
def _limits(negative, a_ptr, b_ptr, M: tl.constexpr, N: tl.constexpr):
    """How F behaves as x goes to infinity, see `reference.py`: the limit, the slope, and whether it grows."""
    top_a, degree_a = tl.load(a_ptr).to(tl.float64), 0
    for i in tl.static_range(1, M + 1):
        a = tl.load(a_ptr + i).to(tl.float64)
        top_a, degree_a = tl.where(a != 0, a, top_a), tl.where(a != 0, i, degree_a)
    top_b, degree_b = top_a * 0.0 + 1.0, 0
    for j in tl.static_range(N):
        b = tl.load(b_ptr + j).to(tl.float64)
        top_b, degree_b = tl.where(b != 0, tl.abs(b), top_b), tl.where(b != 0, j + 1, degree_b)
    ratio = top_a / top_b
    signed = tl.where(negative & (degree_a % 2 == 1), -ratio, ratio)
    slope = tl.where(negative, -signed, signed) * tl.where(degree_a > degree_b + 1, float("inf"), 1.0)
    return tl.where(degree_a == degree_b, signed, 0.0), slope, degree_a > degree_b


# The kernels. x, grad, y and dx: [rows, groups, units, VECTOR] without gaps. a: M + 1 coefficients every a_step, which
# is 0 if the groups share them; b: N every b_step. Grid: chunks x groups, the groups of a chunk together.


@triton.jit(do_not_specialize=["a_step", "b_step", "rows", "groups", "units", "tiles"])
def forward_kernel(
    x_ptr, a_ptr, b_ptr, y_ptr, a_step, b_step, rows, groups, units, tiles,
    M: tl.constexpr, N: tl.constexpr, ABSOLUTE: tl.constexpr,
    LANES: tl.constexpr, VECTOR: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    """F(x)."""
    STORED: tl.constexpr = x_ptr.dtype.element_ty
    DTYPE: tl.constexpr = tl.float64 if STORED == tl.float64 else tl.float32
    chunk, group = tl.program_id(0) // groups, tl.program_id(0) % groups
    end = _end(rows, groups, units, LONG)
    a_ptr, b_ptr = a_ptr + group * a_step, b_ptr + group * b_step
    a = _coefficients(a_ptr, M + 1, False, DTYPE)
    b = _coefficients(b_ptr, N, ABSOLUTE, DTYPE)
    largest = tl.zeros([LANES], DTYPE)
    offset, column = _first(chunk, tiles, group, groups, units, LANES, LONG)
    for _ in tl.range(tiles):
        at = _addresses(offset, VECTOR)
        inside = at < end * VECTOR
        xs = _split(tl.load(x_ptr + at, inside, 0.0).to(DTYPE), LANES, VECTOR)
        ys = ()
        for k in tl.static_range(VECTOR):
            largest = _larger(largest, xs[k])
            ys = ys + (_value(xs[k], a, b, M, N, ABSOLUTE),)
        tl.store(y_ptr + at, _join(ys, LANES, VECTOR, 0).to(STORED), inside)
        offset, column = _next(offset, column, groups, units, LANES)
    if _exceeds(largest, M, N):
        _careful(
            x_ptr, x_ptr, a_ptr, b_ptr, y_ptr, y_ptr, a_ptr, chunk, group, end, groups, units, tiles, 0,
            M, N, ABSOLUTE, False, True, LANES, VECTOR, LONG,
        )  # fmt: skip


@triton.jit(do_not_specialize=["a_step", "b_step", "rows", "groups", "units", "tiles", "chunks"])
def backward_kernel(
    grad_ptr, x_ptr, a_ptr, b_ptr, dx_ptr, y_ptr, sums_ptr, a_step, b_step, rows, groups, units, tiles, chunks,
    M: tl.constexpr, N: tl.constexpr, ABSOLUTE: tl.constexpr, OUTPUT: tl.constexpr,
    LANES: tl.constexpr, VECTOR: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    """dx, with OUTPUT F(x), and the sums of each chunk for da and db: float64 [M + 1 + N, groups, chunks]."""
    STORED: tl.constexpr = x_ptr.dtype.element_ty
    DTYPE: tl.constexpr = tl.float64 if STORED == tl.float64 else tl.float32
    chunk, group = tl.program_id(0) // groups, tl.program_id(0) % groups
    end = _end(rows, groups, units, LONG)
    a_ptr, b_ptr = a_ptr + group * a_step, b_ptr + group * b_step
    a = _coefficients(a_ptr, M + 1, False, DTYPE)
    b = _coefficients(b_ptr, N, ABSOLUTE, DTYPE)
    largest = tl.zeros([LANES], DTYPE)
    sums = _zeros(M + 1 + N, LANES, DTYPE)
    offset, column = _first(chunk, tiles, group, groups, units, LANES, LONG)
    for _ in tl.range(tiles):
        at = _addresses(offset, VECTOR)
        inside = at < end * VECTOR
        xs = _split(tl.load(x_ptr + at, inside, 0.0).to(DTYPE), LANES, VECTOR)
        gs = _split(tl.load(grad_ptr + at, inside, 0.0).to(DTYPE), LANES, VECTOR)
        dxs, ys, terms = (), (), ()
        for k in tl.static_range(VECTOR):
            largest = _larger(largest, xs[k])
            dx, y, terms = _gradient(gs[k], xs[k], a, b, terms, M, N, ABSOLUTE)
            dxs, ys = dxs + (dx,), ys + (y,)
        sums = _add(sums, terms, M + 1 + N)
        tl.store(dx_ptr + at, _join(dxs, LANES, VECTOR, 0).to(STORED), inside)
        if OUTPUT:
            tl.store(y_ptr + at, _join(ys, LANES, VECTOR, 0).to(STORED), inside)
        offset, column = _next(offset, column, groups, units, LANES)
    careful = _exceeds(largest, M, N)
    if N > 0 and not ABSOLUTE and DTYPE == tl.float32:
        careful = careful | _sign_is_open(b, N)
    stride = groups * chunks
    sums_ptr += group * chunks + chunk
    if careful:
        _careful(
            grad_ptr, x_ptr, a_ptr, b_ptr, dx_ptr, y_ptr, sums_ptr, chunk, group, end, groups, units, tiles, stride,
            M, N, ABSOLUTE, True, OUTPUT, LANES, VECTOR, LONG,
        )  # fmt: skip
    else:
        for i in tl.static_range(M + 1 + N):
            tl.store(sums_ptr + i * stride, tl.sum(sums[i].to(tl.float64), 0))


@triton.jit
def _careful(
    grad_ptr, x_ptr, a_ptr, b_ptr, dx_ptr, y_ptr, sums_ptr, chunk, group, end, groups, units, tiles, stride,
    M: tl.constexpr, N: tl.constexpr, ABSOLUTE: tl.constexpr, GRADIENT: tl.constexpr, OUTPUT: tl.constexpr,
    LANES: tl.constexpr, VECTOR: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    """A chunk once more, in float64: scalar by scalar, then the infinities, so as to need no more registers."""
    STORED: tl.constexpr = x_ptr.dtype.element_ty
    tl.debug_barrier()  # other lanes have stored what is stored anew
    sums = _zeros(M + 1 + N if GRADIENT else 0, LANES, tl.float64)
    for k in tl.range(VECTOR):
        offset, column = _first(chunk, tiles, group, groups, units, LANES, LONG)
        for _ in tl.range(tiles):
            at, inside = offset * VECTOR + k, offset < end
            x = _load_wide(x_ptr + at, inside)
            inside &= tl.abs(x) != float("inf")
            x = tl.where(inside, x, 0.0)
            a = _coefficients(a_ptr, M + 1, False, tl.float64)
            b = _coefficients(b_ptr, N, ABSOLUTE, tl.float64)
            if GRADIENT:
                grad = _load_wide(grad_ptr + at, inside)
                dx, y, sums = _gradient(grad, x, a, b, sums, M, N, ABSOLUTE)
                tl.store(dx_ptr + at, _narrow(dx, STORED), inside)
            else:
                y = _value(x, a, b, M, N, ABSOLUTE)
            if OUTPUT:
                tl.store(y_ptr + at, _narrow(y, STORED), inside)
            offset, column = _next(offset, column, groups, units, LANES)
    if GRADIENT:
        for i in tl.static_range(M + 1 + N):
            tl.store(sums_ptr + i * stride, tl.sum(sums[i], 0))
    for k in tl.range(VECTOR):
        offset, column = _first(chunk, tiles, group, groups, units, LANES, LONG)
        for _ in tl.range(tiles):
            at, inside = offset * VECTOR + k, offset < end
            x = _load_wide(x_ptr + at, inside)
            inside &= tl.abs(x) == float("inf")
            limit, slope, grows = _limits(x < 0, a_ptr, b_ptr, M, N)
            if GRADIENT:
                grad = _load_wide(grad_ptr + at, inside)
                tl.store(dx_ptr + at, _narrow(tl.where(grows, slope * grad, 0.0), STORED), inside)
            if OUTPUT:
                tl.store(y_ptr + at, _narrow(tl.where(grows, slope * x, limit), STORED), inside)
            offset, column = _next(offset, column, groups, units, LANES)


@triton.jit
def _load_wide(pointer, inside):
    """As float64, by way of float32 from 16 bits."""
    value = tl.load(pointer, inside, 0.0)
    if value.dtype == tl.float64:
        return value
    else:
        return value.to(tl.float32).to(tl.float64)


@triton.jit(do_not_specialize=["groups", "chunks", "a_rows", "b_rows"])
def sum_kernel(
    sums_ptr, b_ptr, da_ptr, db_ptr, groups, chunks, a_rows, b_rows,
    M: tl.constexpr, N: tl.constexpr, ABSOLUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds the sums of `backward_kernel` to da and db. Grid: rows x (M + 1 + N)."""
    row, i = tl.program_id(0), tl.program_id(1)
    rows = tl.where(i <= M, a_rows, b_rows)
    if row < rows:
        count = groups // rows * chunks  # a shared row takes the chunks of all groups
        sums_ptr += i.to(tl.int64) * groups * chunks + row.to(tl.int64) * count
        total = tl.zeros([BLOCK], tl.float64)
        for start in tl.range(0, count, BLOCK):
            at = start + tl.arange(0, BLOCK)
            total += tl.load(sums_ptr + at, at < count, 0.0)
        value = tl.sum(total, 0)
        if i <= M:
            tl.store(da_ptr + row * (M + 1) + i, _narrow(value, da_ptr.dtype.element_ty))
        else:
            at = row * N + i - M - 1
            if ABSOLUTE:
                value = tl.where(tl.load(b_ptr + at).to(tl.float32) < 0, -value, value)
            tl.store(db_ptr + at, _narrow(value, db_ptr.dtype.element_ty))


# From tensors to launches.


def forward(x: Tensor, numerator: Tensor, denominator: Tensor, form: str, width: int) -> Tensor:
    """F(x), see `op.Kernel`."""
    a, b, y = _readable(numerator), _readable(denominator), torch.empty_like(x)
    if x.numel():
        programs, sizes, options = plan(x, a, b, form, width)
        with torch.cuda.device_of(x):
            forward_kernel[(programs,)](x, a, b, y, *_steps(a, b), *sizes[:4], **options)
    return y


def backward(
    grad: Tensor, x: Tensor, numerator: Tensor, denominator: Tensor, form: str, width: int, output: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The gradients, and with `output` F(x) from the same pass over x; see `op.Kernel`."""
    a, b, dx = _readable(numerator), _readable(denominator), torch.empty_like(x)
    y = torch.empty_like(x) if output else None
    if not x.numel():
        return dx, torch.zeros_like(numerator), torch.zeros_like(denominator), y
    programs, sizes, options = plan(x, a, b, form, width)
    da, db = torch.empty_like(a), torch.empty_like(b)
    columns = a.shape[1] + b.shape[1]
    sums = torch.empty(columns, programs, dtype=torch.float64, device=x.device)
    with torch.cuda.device_of(x):
        backward_kernel[(programs,)](
            grad, x, a, b, dx, dx if y is None else y, sums, *_steps(a, b), *sizes, OUTPUT=output, **options
        )
        orders = {name: options[name] for name in ("M", "N", "ABSOLUTE")}
        grid = (max(a.shape[0], b.shape[0]), columns)
        sum_kernel[grid](sums, b, da, db, sizes[1], sizes[4], a.shape[0], b.shape[0], **orders, BLOCK=SUM_BLOCK)
    return dx, da.to(numerator.dtype), db.to(denominator.dtype), y


def try_out() -> None:
    """Compile and run the smallest of cases on the current GPU, so that whatever is broken breaks here."""
    x, a = torch.ones(1, device="cuda"), torch.ones(1, 2, device="cuda")
    if not abs(forward(x, a, a[:, :1], "abs_of_sum", 1).item() - 1.0) < 1e-6:
        raise GrkanRuntimeError("its kernel gives a wrong result")


def plan(x: Tensor, a: Tensor, b: Tensor, form: str, width: int) -> tuple[int, tuple[int, ...], dict[str, int | bool]]:
    """How many programs, their shape (rows, groups, units, tiles, chunks), and what the kernels are compiled for."""
    groups = max(a.shape[0], b.shape[0])
    vector, lanes = math.gcd(width, VECTOR_BYTES // x.itemsize), _warp_size(x.device)
    units, rows = width // vector, x.numel() // (groups * width)
    tiles = min(max(x.numel() // PROGRAMS, SHORTEST_CHUNK), LONGEST_CHUNK) // (lanes * vector)
    tiles = min(tiles, -(-rows * units // lanes))
    chunks = -(-rows * units // (lanes * tiles))
    # Lanes behind the last row have offsets, too.
    last = (rows + 2 + lanes * tiles // units) * groups * width
    options = {
        "M": a.shape[1] - 1,
        "N": b.shape[1],
        "ABSOLUTE": form == "sum_of_abs",
        "LANES": lanes,
        "VECTOR": vector,
        "LONG": last >= 2**31,
        "num_warps": 1,
    }
    return groups * chunks, (rows, groups, units, tiles, chunks), options


@functools.cache
def _warp_size(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).warp_size if torch.version.hip else 32


def _readable(coefficients: Tensor) -> Tensor:
    """Contiguous, and of a type that the kernels read."""
    return (coefficients if coefficients.itemsize > 1 else coefficients.float()).contiguous()


def _steps(a: Tensor, b: Tensor) -> tuple[int, int]:
    return (0 if a.shape[0] == 1 else a.shape[1]), (0 if b.shape[0] == 1 else b.shape[1])
