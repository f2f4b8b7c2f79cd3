"""The group-wise rational function: its definition in plain PyTorch.

Every group g of channels has coefficients a (numerator) and b (denominator), and each scalar x of the group becomes

    F(x) = P(x) / Q(x),      P(x) = a_0 + a_1 x + ... + a_m x^m

with one of two denominators that have no root (Molina et al., "Padé Activation Units", arXiv 1907.06732):

    abs_of_sum    Q(x) = 1 + |A(x)|,   A(x) = b_1 x + ... + b_n x^n         (version B; KAT, arXiv 2409.10594, Eq. 12)
    sum_of_abs    Q(x) = 1 + A(|x|),   A(t) = |b_1| t + ... + |b_n| t^n     (version A; the released KAT kernels)

This file is what every kernel is compared with. Three conventions complete the formula:

* sign(0) = +1, for both signed zeros. The identity start has b = 0; with sign(0) = 0, which is what the gradient of
  `torch.abs` takes, b would never receive a gradient.
* No finite x overflows or underflows where F does not. A power of x, or 1/Q^2, can leave float32 where F(x) and F'(x)
  do not, so a tensor that holds such an x is computed in float64, by the same Horner scheme. That is enough for all of
  float32 up to order 7, and for float64 input up to 1e40. Evaluating in 1/x instead would fail where b = 0. 1/Q is
  multiplied twice; Q^2 is never formed.
* NaN stays NaN. F(+-inf) is the limit of F and F'(+-inf) the limit of F'; the coefficients get no gradient from there.

Both functions take x as [..., groups, width]: the scalars of a group lie along the last dimension.
"""

import torch
from torch import Tensor

FORMS = ("abs_of_sum", "sum_of_abs")

# |x|^m and |x|^(2n) may reach 2^96 before float32 arithmetic is left, so that 2^30 remain for the coefficients: x^m
# must not overflow, and 1/Q^2, a factor of the derivatives, must not underflow.
_SAFE_BITS = 96


def rational(x: Tensor, numerator: Tensor, denominator: Tensor, form: str) -> Tensor:
    """F(x), differentiable any number of times, in forward and reverse mode and under torch.func.

    Args:
        x: [..., G, W], a floating dtype.
        numerator: [G or 1, m + 1], a_0 first.
        denominator: [G or 1, n], b_1 first; n = 0 makes F a polynomial.
        form: "abs_of_sum" or "sum_of_abs".

    Returns:
        Shape and dtype of x. Arithmetic is float64 for float64 and where powers of x need it, and float32 otherwise.
    """
    dtype = _arithmetic(x, numerator, denominator, form)
    a, b = _columns(numerator, dtype), _columns(denominator, dtype)
    z = x.to(dtype)
    if dtype is torch.float32:
        return _ratio(z, a, b, form).to(x.dtype)
    infinite = z.isinf()
    y = _ratio(torch.where(infinite, 0.0, z), a, b, form)
    limit, slope, grows = _limits(z, a, b)
    # The two masks keep 0 * inf out of the derivatives of the scalars that are finite.
    at_infinity = torch.where(grows, slope * torch.where(infinite, z, 0.0), limit)
    return torch.where(infinite, at_infinity, y).to(x.dtype)


def rational_backward(
    grad: Tensor, x: Tensor, numerator: Tensor, denominator: Tensor, form: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The vector-Jacobian product of `rational` in closed form.

    With u = grad / Q and w = -u F s, where s is the sign that belongs to the absolute value in Q:

        da_i = sum u x^i,    db_j = sum w x^j,    dx = u P'(x) + w A'(x)                     (abs_of_sum, s = sign A(x))
        da_i = sum u x^i,    db_j = sign(b_j) sum w |x|^j,    dx = u P'(x) + w sign(x) A'(|x|)       (sum_of_abs, s = 1)

    Args:
        grad: the gradient of F(x), shaped like x.
        x, numerator, denominator, form: as for `rational`.

    Returns:
        The gradients of x, numerator and denominator, each with the shape and dtype of its tensor; differentiable.
    """
    dtype = _arithmetic(x, numerator, denominator, form)
    a, b = _columns(numerator, dtype), _columns(denominator, dtype)
    z, g = x.to(dtype), grad.to(dtype)
    if dtype is torch.float32:
        dx, terms_a, terms_b = _ratio_backward(g, z, a, b, form)
    else:
        infinite = z.isinf()
        dx, terms_a, terms_b = _ratio_backward(torch.where(infinite, 0.0, g), torch.where(infinite, 0.0, z), a, b, form)
        _, slope, grows = _limits(z, a, b)
        dx = torch.where(infinite, torch.where(grows, slope * g, 0.0), dx)
    return dx.to(x.dtype), _gather(terms_a, numerator), _gather(terms_b, denominator)


def _arithmetic(x: Tensor, numerator: Tensor, denominator: Tensor, form: str) -> torch.dtype:
    """The dtype to compute in: float32 where no power of x can overflow or underflow it, float64 otherwise."""
    if x.dtype == torch.float64:
        return torch.float64
    if x.device.type == "mps":  # has no float64
        return torch.float32
    if not _is_readable(x):
        return torch.float64
    if x.numel() == 0:
        return torch.float32
    low, high = torch.aminmax(x.detach())
    # NaN hides the extremes; it fails the comparison, and so counts as out of range.
    m, n = numerator.shape[-1] - 1, denominator.shape[-1]
    fits = torch.maximum(-low, high).float() <= 2.0 ** (_SAFE_BITS // max(m, 2 * n, 1))
    if form == "abs_of_sum" and n > 1:
        # A = b_2 x^2 + ... has a sign for every x, and the gradient of b_1 needs it, but near 0 it underflows to 0.
        fits = fits & ~((denominator[:, 0] == 0) & (denominator != 0).any(-1)).any()
    return torch.float32 if fits.item() else torch.float64


def _is_readable(x: Tensor) -> bool:
    """Whether Python may branch on the values of x: not while tracing or transforming, and not on the meta device."""
    return (
        type(x) in (Tensor, torch.nn.Parameter)
        and not x.is_meta
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and not (x.is_cuda and torch.cuda.is_current_stream_capturing())
    )


def _columns(coefficients: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """[G, k] -> k tensors [G, 1], each of which broadcasts over [..., G, W]."""
    return [column.unsqueeze(-1) for column in coefficients.to(dtype).unbind(-1)]


def _sign(x: Tensor) -> Tensor:
    """The sign, +1 for both zeros; a constant for autograd. By arithmetic: `torch.where` takes eight times as long."""
    return 1.0 - 2.0 * (x < 0).to(x.dtype)


def _sign_of_product(x: Tensor, y: Tensor) -> Tensor:
    """The sign of x y, right where the product underflows, too."""
    return 1.0 - 2.0 * ((x < 0) & (y > 0) | (x > 0) & (y < 0)).to(x.dtype)


def _magnitude(x: Tensor) -> Tensor:
    """|x| with derivative +1 at both signed zeros."""
    return x * _sign(x)


def _horner(coefficients: list[Tensor], x: Tensor) -> Tensor:
    """coefficients[0] + coefficients[1] x + coefficients[2] x^2 + ..., for at least one coefficient."""
    value = coefficients[-1]
    for coefficient in reversed(coefficients[:-1]):
        value = torch.addcmul(coefficient, value, x)
    return value


def _denominator(x: Tensor, b: list[Tensor], form: str) -> Tensor:
    """Q(x), for n >= 1."""
    if form == "abs_of_sum":
        inner = _horner(b, x)
        return 1.0 + x * inner * _sign_of_product(x, inner)
    t = _magnitude(x)
    return 1.0 + t * _horner([_magnitude(coefficient) for coefficient in b], t)


def _ratio(x: Tensor, a: list[Tensor], b: list[Tensor], form: str) -> Tensor:
    numerator = _horner(a, x)
    if b:
        return numerator / _denominator(x, b, form)
    return numerator if len(a) > 1 else numerator + 0.0 * x  # a constant takes the shape of x, and its NaN


def _ratio_backward(
    grad: Tensor, x: Tensor, a: list[Tensor], b: list[Tensor], form: str
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """dx, and the summands of every da_i and db_j."""
    absolute = form == "sum_of_abs"
    t = _magnitude(x) if absolute else x
    magnitudes = [_magnitude(coefficient) for coefficient in b] if absolute else b
    if b:
        inner = _horner(magnitudes, t)
        sign = 1.0 if absolute else _sign_of_product(x, inner)
        inverse = 1.0 / (1.0 + t * inner * sign)
        u = grad * inverse
        # (P inverse) inverse, never P / Q^2
        w = -u * (_horner(a, x) * inverse) * sign
    else:
        u = grad
    dx = u * _horner([i * a[i] for i in range(1, len(a))], x) if len(a) > 1 else torch.zeros_like(u)
    terms_a = _times_powers(u, x, len(a))
    if not b:
        return dx, terms_a, []
    slope = _horner([j * magnitudes[j - 1] for j in range(1, len(b) + 1)], t)
    terms_b = _times_powers(w * t, t, len(b))
    if absolute:
        slope = slope * _sign(x)
        terms_b = [term * _sign(coefficient) for term, coefficient in zip(terms_b, b, strict=True)]
    return dx + w * slope, terms_a, terms_b


def _times_powers(first: Tensor, x: Tensor, count: int) -> list[Tensor]:
    """[first, first x, first x^2, ...]; multiplied up one by one, so that nothing overflows before the last does."""
    terms = [first]
    for _ in range(count - 1):
        terms.append(terms[-1] * x)
    return terms


def _gather(terms: list[Tensor], coefficients: Tensor) -> Tensor:
    """Sum [..., G, W] summands to the shape and dtype of their coefficients; a shared row takes all of them."""
    if not terms:
        return torch.zeros_like(coefficients)
    summed = [*range(terms[0].dim() - 2), -1] + ([-2] if coefficients.shape[0] == 1 else [])
    columns = [term.sum(summed).reshape(coefficients.shape[0]) for term in terms]
    return torch.stack(columns, dim=-1).to(coefficients.dtype)


def _limits(x: Tensor, a: list[Tensor], b: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """How F behaves as x goes to infinity on its own side, from the highest non-zero coefficients of P and Q.

    F(x) tends to (p / |q|) x^i / |x|^j for the highest non-zero p = a_i and q = b_j; q = 1 and j = 0 if all b are zero.

    Returns:
        limit, the limit of F where it does not grow; slope, the limit of F' where it grows; grows = i > j.
    """
    a, b = [c.detach() for c in a], [c.detach() for c in b]
    top_a, degree_a = a[0], torch.zeros_like(a[0])
    for i in range(1, len(a)):
        top_a, degree_a = torch.where(a[i] != 0, a[i], top_a), torch.where(a[i] != 0, float(i), degree_a)
    top_b, degree_b = torch.ones_like(a[0]), torch.zeros_like(a[0])
    for j in range(1, len(b) + 1):
        top_b = torch.where(b[j - 1] != 0, b[j - 1].abs(), top_b)
        degree_b = torch.where(b[j - 1] != 0, float(j), degree_b)
    excess = degree_a - degree_b
    ratio = top_a / top_b
    flips = (x < 0) & (degree_a % 2 == 1)  # the sign of x^i
    signed = torch.where(flips, -ratio, ratio)
    limit = torch.where(excess == 0, signed, 0.0)
    slope = signed * _sign(x) * torch.where(excess > 1, torch.inf, 1.0)
    return limit, slope, excess > 0
