"""The Triton kernels behind `op.py`: float16 to float64 on a GPU, any order, both forms, any width.

A group holds rows x width scalars. The kernels read them in vectors: the vector size is the largest power of two
scalars that divides the width, up to 16 bytes. A lane processes one vector at a time. A tile is one vector for each
lane. A program is one or two warps and processes a chunk of consecutive tiles, whose length depends only on the shape.
Each chunk writes its sums for the coefficients' gradients to memory, and a second kernel adds them in a fixed order. So
there are no atomics, and the bits are the same each time, whatever the number of multiprocessors.

Shapes are ordinary arguments: a new batch, image or layer size needs no compilation. Only another dtype, order, form or
vector size does, and tensors that need 64-bit indices.

float64 inputs are computed in float64, all others in float32. The main loop skips the care that `reference.py` takes
with extreme x. It records the largest |x| that each lane meets. If one is infinite, NaN, or so large that a power may
overflow, the program computes its chunk once more in float64.
"""

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..errors import GrkanRuntimeError

VECTOR_BYTES = 16
"""The most that one instruction reads or writes."""

FORWARD_WARPS, BACKWARD_WARPS = 2, 1
"""Warps of a program. A multiprocessor holds at most 32 programs, so one warp each is too few to wait for memory. The
backward has not the registers for more, and adds the sums of one warp without a barrier."""

SHORTEST_CHUNK, LONGEST_CHUNK, PROGRAMS = 2048, 4096, 8192
"""Chunk lengths in scalars. The backward cuts x into 8192 chunks, about twice what a GPU processes at once, within
these limits. At the lower one, the sums are below 2 % of the bytes that a chunk reads and writes at order (7, 6). At
the upper one, a lane adds at most 32 partial sums, one for each vector: float32 is right to 1e-6 even if all roundings
go one way. The forward, which adds nothing, takes the lower one."""

SUM_BLOCK = 1024
"""The number of sums that the second kernel adds in parallel."""

SAFE_BITS = tl.constexpr(96)
"""In float32, |x|^m and |x|^n may reach 2^96. That leaves a factor of 2^31 for the coefficients."""


# Where things are. An offset counts vectors from the start of x, so every address is a multiple of a vector's size.


@triton.jit
def _first(chunk, tiles, group, groups, units, LANES: tl.constexpr, LONG: tl.constexpr):
    """Return the offset of each lane's first vector, and the index of that vector within its row of the group."""
    if LONG:
        chunk, group = chunk.to(tl.int64), group.to(tl.int64)
        groups, units = groups.to(tl.int64), units.to(tl.int64)
    number = chunk * tiles * LANES + tl.arange(0, LANES)
    row = number // units
    column = number - row * units
    return row * (groups * units) + group * units + column, column


@triton.jit
def _next(offset, column, groups, units, LANES: tl.constexpr):
    """Advance both by LANES vectors. A division at each step would cost more than these few additions."""
    groups, units = groups.to(offset.dtype), units.to(offset.dtype)
    rows = LANES // units
    columns = LANES - rows * units
    column += columns
    wraps = column >= units
    offset += rows * groups * units + columns + tl.where(wraps, (groups - 1) * units, 0)
    return offset, tl.where(wraps, column - units, column)


@triton.jit
def _end(rows, groups, units, LONG: tl.constexpr):
    """Exclusive upper bound on valid vector offsets."""
    if LONG:
        rows, groups, units = rows.to(tl.int64), groups.to(tl.int64), units.to(tl.int64)
    return rows * groups * units


@triton.jit
def _addresses(offset, VECTOR: tl.constexpr):
    return (offset * VECTOR)[:, None] + tl.arange(0, VECTOR)[None, :]


@triton.jit
def _split(vectors, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """[LANES, VECTOR] -> VECTOR tensors [LANES], in the order that `_join` expects. No data leave their lane."""
    if VECTOR == 1:
        return (tl.reshape(vectors, [LANES]),)
    else:
        even, odd = tl.split(tl.reshape(vectors, [LANES, VECTOR // 2, 2]))
        return _split(even, LANES, VECTOR // 2) + _split(odd, LANES, VECTOR // 2)


@triton.jit
def _join(scalars, LANES: tl.constexpr, VECTOR: tl.constexpr, FIRST: tl.constexpr):
    """Undo `_split` for the VECTOR tensors from index FIRST on."""
    if VECTOR == 1:
        return tl.reshape(scalars[FIRST], [LANES, 1])
    else:
        even = _join(scalars, LANES, VECTOR // 2, FIRST)
        odd = _join(scalars, LANES, VECTOR // 2, FIRST + VECTOR // 2)
        return tl.reshape(tl.join(even, odd), [LANES, VECTOR])


# The function, for any shape of x.


@triton.jit
def _coefficients(pointer, COUNT: tl.constexpr, ABSOLUTE: tl.constexpr, DTYPE: tl.constexpr):
    """Load COUNT scalars into a tuple."""
    values = ()
    for i in tl.static_range(COUNT):
        value = tl.load(pointer + i).to(DTYPE)
        if ABSOLUTE:
            value = tl.abs(value)
        values = values + (value + 0.0,)  # -0 becomes +0, because A inherits the sign
    return values


@triton.jit
def _horner(c, x, COUNT: tl.constexpr):
    """Evaluate p(x) = c[0] + c[1] x + ... with COUNT >= 1 coefficients, p'(x), and (p(x) - c[0]) / x."""
    value = tl.zeros_like(x) + c[COUNT - 1]
    slope = tl.zeros_like(x)
    before = tl.zeros_like(x)
    for k in tl.static_range(1, COUNT):
        if k == 1:
            slope = value
        else:
            slope = tl.fma(slope, x, value)
        before = value
        value = tl.fma(value, x, c[COUNT - 1 - k])
    return value, slope, before


@triton.jit
def _inverse(q):
    """1 / q for q >= 1: two instructions and 3 ulp. A float32 division takes seven instructions."""
    if q.dtype == tl.float64:
        return 1.0 / q
    else:
        root = tl.rsqrt(q)
        return root * root


@triton.jit
def _sign_bit(x):
    """Return the sign bit of x as an integer of the same size."""
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
    value, _, _ = _horner(a, x, M + 1)
    if N > 0:
        t = tl.abs(x) if ABSOLUTE else x
        last, _, _ = _horner(b, t, N)
        value *= _inverse(1.0 + tl.abs(last * t))
    elif M == 0:
        value += 0.0 * x  # NaN stays NaN
    return value


@triton.jit
def _gradient(g, x, a, b, sums, M: tl.constexpr, N: tl.constexpr, ABSOLUTE: tl.constexpr):
    """Return dx, F(x), and the sums plus the terms of da and db. In the form sum_of_abs, b is |b|.

    With r = 1 / Q and v = -s F: da_i += g (r x^i), db_j += g v (r x^j), dx = g (r (P' + v A')). In this order a product
    underflows only if its result does; g / Q would underflow earlier. If `sums` is empty, return the terms themselves.
    """
    value, slope, _ = _horner(a, x, M + 1)
    if N > 0:
        t = tl.abs(x) if ABSOLUTE else x
        last, of_last, rest = _horner(b, t, N)
        # Fused, so that an underflow keeps its sign. An exact zero is +0, whose sign is +1 by convention.
        inner = tl.fma(last, t, 0.0)
        of_inner = tl.fma(of_last, t, last)
        inverse = _inverse(1.0 + tl.abs(inner))
        value *= inverse
        if ABSOLUTE:
            v = -value
            sign = _sign_bit(x + 0.0)
            odd = _flip(v, sign)  # the sums below use powers of x, not of |x|: odd powers differ in sign
            slope = tl.fma(odd, of_inner, slope)
            odd_gv = g * odd
        else:
            # If b_1 = 0, x^2 may underflow, but A(x) has the sign of A(x) / x^2.
            v = _flip(-value, _sign_bit(tl.where(b[0] == 0, rest, inner)))
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
    """Convert float64 to DTYPE. No instruction converts it to 16 bits directly."""
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
    """Whether some lane has met NaN, infinity, or an x too large for the arithmetic of `largest`."""
    if largest.dtype == tl.float64:
        limit: tl.constexpr = 1.7976931348623157e308
    else:
        limit: tl.constexpr = 2.0 ** (SAFE_BITS // max(M, N, 1))
    return tl.max((largest <= limit).to(tl.int32) ^ 1, 0) > 0


@triton.jit
def _sign_is_open(b, N: tl.constexpr):
    """Whether a power above x^2 decides the sign of A(x) near 0, where it underflows. For the form abs_of_sum."""
    higher = False
    for j in tl.static_range(2, N):
        higher = higher | (b[j] != 0)
    return (b[0] == 0) & (b[1] == 0) & higher


@triton.jit
def _limits(negative, a_ptr, b_ptr, M: tl.constexpr, N: tl.constexpr):
    """Return the limit of F at infinity, its slope, and whether F grows there. See `reference.py`."""
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


# The kernels. x, grad, y and dx are contiguous [rows, groups, units, VECTOR]. Group g has M + 1 coefficients at
# a + g * a_step and N at b + g * b_step; a step is 0 if the groups share a row. Grid: chunks x groups, groups
# innermost.


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
    """dx, F(x) if OUTPUT, and each chunk's sums for da and db: float64 [M + 1 + N, groups, chunks]."""
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
    # Of 16 bits, read the next tile early: the registers leave too few warps to wait for memory.
    EARLY: tl.constexpr = STORED.primitive_bitwidth == 16
    at = _addresses(offset, VECTOR)
    inside = at < end * VECTOR
    if EARLY:
        next_x, next_grad = tl.load(x_ptr + at, inside, 0.0), tl.load(grad_ptr + at, inside, 0.0)
    for tile in tl.range(tiles):
        if EARLY:
            x, grad = next_x, next_grad
        else:
            x, grad = tl.load(x_ptr + at, inside, 0.0), tl.load(grad_ptr + at, inside, 0.0)
        offset, column = _next(offset, column, groups, units, LANES)
        next_at = _addresses(offset, VECTOR)
        next_inside = next_at < end * VECTOR
        if EARLY:
            next_inside &= tile + 1 < tiles
            next_x = tl.load(x_ptr + next_at, next_inside, 0.0)
            next_grad = tl.load(grad_ptr + next_at, next_inside, 0.0)
        xs, gs = _split(x.to(DTYPE), LANES, VECTOR), _split(grad.to(DTYPE), LANES, VECTOR)
        dxs, ys, terms = (), (), ()
        for k in tl.static_range(VECTOR):
            largest = _larger(largest, xs[k])
            if DTYPE == tl.float64:
                dx, y, sums = _gradient(gs[k], xs[k], a, b, sums, M, N, ABSOLUTE)
            else:
                dx, y, terms = _gradient(gs[k], xs[k], a, b, terms, M, N, ABSOLUTE)
            dxs, ys = dxs + (dx,), ys + (y,)
        if DTYPE != tl.float64:
            sums = _add(sums, terms, M + 1 + N)
        tl.store(dx_ptr + at, _join(dxs, LANES, VECTOR, 0).to(STORED), inside)
        if OUTPUT:
            tl.store(y_ptr + at, _join(ys, LANES, VECTOR, 0).to(STORED), inside)
        at, inside = next_at, next_inside
    # A sum beyond float32 may be one within float64, which the coefficients may have.
    nothing = sums[0] * 0.0
    for i in tl.static_range(1, M + 1 + N):
        nothing = tl.fma(sums[i], tl.zeros([LANES], DTYPE), nothing)
    careful = _exceeds(_larger(largest, nothing), M, N)
    if N > 2 and not ABSOLUTE and DTYPE == tl.float32:
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
    """Compute a chunk once more in float64, one scalar at a time, then the infinities: this needs few registers."""
    STORED: tl.constexpr = x_ptr.dtype.element_ty
    tl.debug_barrier()  # the stores below overwrite what other lanes have stored
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
    """Load as float64; 16-bit types are converted through float32."""
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
    """Add up the sums of `backward_kernel`. Grid: rows x (M + 1 + N)."""
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
    """F(x), see `dispatch.Kernel`."""
    a, b, y = _readable(numerator), _readable(denominator), torch.empty_like(x)
    if x.numel():
        programs, sizes, options = plan(x, a, b, form, width, gradient=False)
        with torch.cuda.device_of(x):
            forward_kernel[(programs,)](x, a, b, y, *_steps(a, b), *sizes[:4], **options)
    return y


def backward(
    grad: Tensor, x: Tensor, numerator: Tensor, denominator: Tensor, form: str, width: int, output: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The gradients and, if `output`, F(x) from the same pass over x. See `dispatch.Kernel`."""
    a, b, dx = _readable(numerator), _readable(denominator), torch.empty_like(x)
    y = torch.empty_like(x) if output else None
    if not x.numel():
        return dx, torch.zeros_like(numerator), torch.zeros_like(denominator), y
    programs, sizes, options = plan(x, a, b, form, width, gradient=True)
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
    """Compile and run the smallest case on the current GPU, so that a broken setup fails here."""
    x, a = torch.ones(1, device="cuda"), torch.ones(1, 2, device="cuda")
    if not abs(forward(x, a, a[:, :1], "abs_of_sum", 1).item() - 1.0) < 1e-6:
        raise GrkanRuntimeError("the compiled kernel gives a wrong result")


def plan(
    x: Tensor, a: Tensor, b: Tensor, form: str, width: int, *, gradient: bool
) -> tuple[int, tuple[int, ...], dict[str, int | bool]]:
    """Return the number of programs, (rows, groups, units, tiles, chunks), and the compile-time options."""
    groups = max(a.shape[0], b.shape[0])
    chunk, warps = program(x.numel(), gradient)
    vector, lanes = math.gcd(width, VECTOR_BYTES // x.itemsize), warps * _warp_size(x.device)
    units, rows = width // vector, x.numel() // (groups * width)
    tiles = chunk // (lanes * vector)
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
        "num_warps": warps,
    }
    return groups * chunks, (rows, groups, units, tiles, chunks), options


def program(size: int, gradient: bool) -> tuple[int, int]:
    """Return the chunk length and the warps of a program of the forward or the backward, for `size` scalars."""
    if not gradient:
        return SHORTEST_CHUNK, FORWARD_WARPS
    return min(max(size // PROGRAMS, SHORTEST_CHUNK), LONGEST_CHUNK), BACKWARD_WARPS


@functools.cache
def _warp_size(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).warp_size if torch.version.hip else 32


def _readable(coefficients: Tensor) -> Tensor:
    """Make contiguous, in a dtype that the kernels can read."""
    return (coefficients if coefficients.itemsize > 1 else coefficients.float()).contiguous()


def _steps(a: Tensor, b: Tensor) -> tuple[int, int]:
    return (0 if a.shape[0] == 1 else a.shape[1]), (0 if b.shape[0] == 1 else b.shape[1])
