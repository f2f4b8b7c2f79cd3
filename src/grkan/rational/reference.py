"""The group-wise rational function: its definition in plain PyTorch.

Every group g of channels has coefficients a (numerator) and b (denominator), and each scalar x of the group becomes

    F(x) = P(x) / Q(x),      P(x) = a_0 + a_1 x + ... + a_m x^m

with one of two denominators that have no root (Molina et al., "Padé Activation Units", arXiv 1907.06732):

    abs_of_sum    Q(x) = 1 + |A(x)|,   A(x) = b_1 x + ... + b_n x^n         (version B; KAT, arXiv 2409.10594, Eq. 12)
    sum_of_abs    Q(x) = 1 + A(|x|),   A(t) = |b_1| t + ... + |b_n| t^n     (version A; the released KAT kernels)

Every kernel is compared with this file. Three conventions complete the formula:

* sign(0) = +1, for both signed zeros. The identity start has b = 0; with sign(0) = 0, as in the gradient of
  `torch.abs`, b would never receive a gradient.
* No intermediate result overflows or underflows before the final result does. This holds for F and for its first and
  second derivatives, in closed form or by autograd. A power of x, 1/Q^2, or a small gradient divided by Q can leave the
  range of float32 where the results do not. Where that may happen, the computation is in float64, and P and Q are
  scaled (`_normalised`). That covers all of float32 up to order 7, and float64 input up to 1e40. Evaluating in 1/x
  instead would fail where b = 0.
* NaN stays NaN. F(+-inf) is the limit of F and F'(+-inf) the limit of F'; infinite x give the coefficients no gradient.

Both functions take x as [..., groups, width]: the scalars of a group lie along the last dimension.
"""

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

FORMS = ("abs_of_sum", "sum_of_abs")

# float32 arithmetic is used while |x|^m and |x|^(2n) are at most 2^96, which leaves 2^30 for the coefficients: x^m must
# not overflow, and 1/Q^2, a factor of the derivatives, must not underflow.
_SAFE_BITS = 96

# The range of gradients for float32 arithmetic: grad / Q must not underflow, and grad x^m must not overflow.
_SMALLEST_GRAD, _LARGEST_GRAD = 2.0**-64, 2.0**30


def rational(x: Tensor, numerator: Tensor, denominator: Tensor, form: str) -> Tensor:
    """Compute F(x), differentiable any number of times, in forward and reverse mode and under torch.func.

    Args:
        x: [..., G, W], a floating dtype.
        numerator: [G or 1, m + 1], a_0 first.
        denominator: [G or 1, n], b_1 first; n = 0 makes F a polynomial.
        form: "abs_of_sum" or "sum_of_abs".

    Returns:
        A tensor with the shape and dtype of x. Arithmetic is float64 if x is float64, if powers of x need it, or if a
        derivative will be taken; otherwise float32.
    """
    dtype = _arithmetic(x, numerator, denominator, form)
    a, b = _columns(numerator, dtype), _columns(denominator, dtype)
    z = x.to(dtype)
    if dtype is torch.float32:
        return _ratio(z, a, _magnitudes(b, form), form).to(x.dtype)
    infinite = z.isinf()
    finite, _, a_scaled, b_scaled, w = _normalised(torch.where(infinite, 0.0, z), a, _magnitudes(b, form), form)
    y = _ratio(finite, a_scaled, b_scaled, form, w[0])
    limit, slope, grows = _limits(z, a, b)
    # The two masks keep 0 * inf out of the derivatives of the scalars that are finite.
    at_infinity = torch.where(grows, slope * torch.where(infinite, z, 0.0), limit)
    return torch.where(infinite, at_infinity, y).to(x.dtype)


def rational_backward(
    grad: Tensor, x: Tensor, numerator: Tensor, denominator: Tensor, form: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the vector-Jacobian product of `rational` in closed form.

    With u = grad / Q and v = -F s, where s is the sign from the absolute value in Q:

        da_i = sum u x^i,    db_j = sum u x^j v,    dx = u (P'(x) + v A'(x))                 (abs_of_sum, s = sign A(x))
        da_i = sum u x^i,    db_j = sign(b_j) sum u |x|^j v,    dx = u (P'(x) + v sign(x) A'(|x|))   (sum_of_abs, s = 1)

    Args:
        grad: the gradient of F(x), shaped like x.
        x, numerator, denominator, form: as for `rational`.

    Returns:
        The gradients of x, numerator and denominator, each with the shape and dtype of its tensor. They are
        differentiable.
    """
    dtype = _arithmetic(x, numerator, denominator, form, grad)
    a, b = _columns(numerator, dtype), _columns(denominator, dtype)
    z, g = x.to(dtype), grad.to(dtype)
    if dtype is torch.float32:
        u, slope, terms_a, terms_b = _ratio_backward(g, z, a, _magnitudes(b, form), form)
        dx = u * slope
    else:
        infinite = z.isinf()
        finite, size, a_scaled, b_scaled, w = _normalised(torch.where(infinite, 0.0, z), a, _magnitudes(b, form), form)
        u, slope, terms_a, terms_b = _ratio_backward(
            torch.where(infinite, 0.0, g), finite, a_scaled, b_scaled, form, w[0]
        )
        terms_a = [term * w[i] for i, term in enumerate(terms_a)]
        terms_b = [term * w[j] for j, term in enumerate(terms_b, 1)]
        _, at_infinity, grows = _limits(z, a, b)
        at_infinity = torch.where(grows, at_infinity * torch.where(infinite, g, 0.0), 0.0)  # two masks, as above
        dx = torch.where(infinite, at_infinity, u / size * slope)
    if form == "sum_of_abs":
        terms_b = [term * _sign(coefficient) for term, coefficient in zip(terms_b, b, strict=True)]
    return dx.to(x.dtype), _gather(terms_a, numerator), _gather(terms_b, denominator)


def sums_of_squares(x: Tensor, numerator: Tensor, denominator: Tensor, form: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return how large F and its derivatives by the coefficients are on the scalars of each group.

    Args:
        x, numerator, denominator, form: as for `rational`, with x of shape [G, W].

    Returns:
        The sums over the scalars of F^2, [G, 1]; of (dF/da_i)^2, [G, m + 1]; and of (dF/db_j)^2, [G, n], in float64.
    """
    z, a = x.double(), _columns(numerator, torch.float64)
    b = _magnitudes(_columns(denominator, torch.float64), form)
    _, _, terms_a, terms_b = _ratio_backward(torch.ones_like(z), z, a, b, form)
    value = _ratio(z, a, b, form)

    def sums(terms: list[Tensor]) -> Tensor:
        return torch.stack([term.square().sum(-1) for term in terms], -1) if terms else z.new_zeros(len(z), 0)

    return sums([value]), sums(terms_a), sums(terms_b)


def _arithmetic(
    x: Tensor, numerator: Tensor, denominator: Tensor, form: str, grad: Tensor | None = None
) -> torch.dtype:
    """Choose the dtype to compute in: float32 if nothing can overflow or underflow in it, else float64.

    If a derivative will be taken, its gradients are not known yet, so the choice is float64.
    """
    if x.dtype == torch.float64:
        return torch.float64
    if x.device.type == "mps":  # has no float64
        return torch.float32
    tensors = (x, numerator, denominator) if grad is None else (x, numerator, denominator, grad)
    if not _is_readable(x) or any(_is_differentiated(t) for t in tensors):
        return torch.float64
    if x.numel() == 0:
        return torch.float32
    low, high = torch.aminmax(x)
    # With a NaN the extremes are unknown; the comparison then fails, so x counts as out of range.
    m, n = numerator.shape[-1] - 1, denominator.shape[-1]
    fits = torch.maximum(-low, high).float() <= 2.0 ** (_SAFE_BITS // max(m, 2 * n, 1))
    if form == "abs_of_sum" and n > 1:
        # The gradient of b_1 needs the sign of A = b_2 x^2 + ..., but near 0 A underflows to 0 and loses it.
        fits = fits & ~((denominator[:, 0] == 0) & (denominator != 0).any(-1)).any()
    if grad is not None:
        size = grad.abs().float()
        fits = fits & ((size == 0) | (size >= _SMALLEST_GRAD) & (size <= _LARGEST_GRAD)).all()
    return torch.float32 if fits.item() else torch.float64


def _is_readable(x: Tensor) -> bool:
    """Whether Python may branch on the values of x: no tracing, no transform, no meta device."""
    return (
        type(x) in (Tensor, torch.nn.Parameter)
        and not x.is_meta
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch._C._are_functorch_transforms_active()
        and not (x.is_cuda and torch.cuda.is_current_stream_capturing())
    )


def _is_differentiated(t: Tensor) -> bool:
    """Whether autograd records operations on t, in reverse or in forward mode."""
    return (t.requires_grad and torch.is_grad_enabled()) or forward_ad.unpack_dual(t).tangent is not None


def _columns(coefficients: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """[G, k] -> k tensors [G, 1], each of which broadcasts over [..., G, W]."""
    return [column.unsqueeze(-1) for column in coefficients.to(dtype).unbind(-1)]


def _sign(x: Tensor) -> Tensor:
    """The sign of x, +1 for both zeros; a constant for autograd. Arithmetic, as `torch.where` is eight times slower."""
    return 1.0 - 2.0 * (x < 0).to(x.dtype)


def _sign_of_product(x: Tensor, y: Tensor) -> Tensor:
    """The sign of x y, correct even where the product underflows."""
    return 1.0 - 2.0 * ((x < 0) & (y > 0) | (x > 0) & (y < 0)).to(x.dtype)


def _magnitude(x: Tensor) -> Tensor:
    """|x| with derivative +1 at both signed zeros."""
    return x * _sign(x)


def _magnitudes(b: list[Tensor], form: str) -> list[Tensor]:
    """The coefficients of A as they appear in Q."""
    return b if form == "abs_of_sum" else [_magnitude(coefficient) for coefficient in b]


def _horner(coefficients: list[Tensor], x: Tensor) -> Tensor:
    """coefficients[0] + coefficients[1] x + coefficients[2] x^2 + ..., for at least one coefficient."""
    value = coefficients[-1]
    for coefficient in reversed(coefficients[:-1]):
        value = torch.addcmul(coefficient, value, x)
    return value


# Below, b holds the coefficients as they appear in Q: their magnitudes in the form sum_of_abs.


def _normalised(
    x: Tensor, a: list[Tensor], b: list[Tensor], form: str
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """Rewrite F as a function of z = x / X for X = max(|x|, 1), with P and Q divided by the value Q(x):

        F(x) = (a_0 w_0 + a_1 w_1 z + ...) / (w_0 + |b_1 w_1 z + ...|),    w_k = X^k / Q(x)

    X and w_k are constants for autograd, as F does not depend on them. Without the division by Q(x), derivatives of F
    would contain the factors F / Q and F / Q^2, which underflow where the other factors are large.

    Returns:
        z; X; a_i w_i; b_j w_j; and w_0, w_1, ...
    """
    size = x.detach().abs().clamp(min=1.0)
    q = _denominator(x.detach(), [coefficient.detach() for coefficient in b], form) if b else torch.ones_like(x)
    # Outside the supported range Q may be infinite where F is finite.
    w = _times_powers(1.0 / q.clamp(max=2.0**1000), size, max(len(a), len(b) + 1))
    scaled_a = [coefficient * w[i] for i, coefficient in enumerate(a)]
    scaled_b = [coefficient * w[j] for j, coefficient in enumerate(b, 1)]
    return x / size, size, scaled_a, scaled_b, w


def _denominator(x: Tensor, b: list[Tensor], form: str, constant: Tensor | float = 1.0) -> Tensor:
    """Compute Q(x) with `constant` in place of the 1, for n >= 1."""
    t = x if form == "abs_of_sum" else _magnitude(x)
    inner = _horner(b, t)
    return constant + t * inner * _sign_of_product(t, inner)


def _ratio(x: Tensor, a: list[Tensor], b: list[Tensor], form: str, constant: Tensor | float = 1.0) -> Tensor:
    """Compute F(x) with `constant` in place of the 1 in Q."""
    numerator = _horner(a, x)
    if len(a) == 1:
        numerator = numerator + 0.0 * x  # give the constant the shape of x, and its NaN
    return numerator / _denominator(x, b, form, constant) if b else numerator


def _ratio_backward(
    grad: Tensor, x: Tensor, a: list[Tensor], b: list[Tensor], form: str, constant: Tensor | float = 1.0
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """Return u, its factor in dx, and the summands of each da_i and of each db_j. `constant` is as in `_ratio`."""
    if not b:
        u = grad
        slope = _slope(a, x) if len(a) > 1 else torch.zeros_like(x)
        return u, slope, _times_powers(u, x, len(a)), []
    t = x if form == "abs_of_sum" else _magnitude(x)
    inner = _horner(b, t)
    sign = _sign_of_product(t, inner)
    inverse = 1.0 / (constant + t * inner * sign)
    u = grad * inverse
    v = _horner(a, x) * inverse * -sign
    slope = v * _slope([torch.zeros_like(b[0]), *b], t)
    if form == "sum_of_abs":
        slope = slope * _sign(x)
    if len(a) > 1:
        slope = slope + _slope(a, x)
    return u, slope, _times_powers(u, x, len(a)), [term * v for term in _times_powers(u * t, t, len(b))]


def _slope(coefficients: list[Tensor], x: Tensor) -> Tensor:
    """Evaluate the derivative of the polynomial, for at least two coefficients."""
    return _horner([k * coefficient for k, coefficient in enumerate(coefficients) if k], x)


def _times_powers(first: Tensor, x: Tensor, count: int) -> list[Tensor]:
    """Return [first, first x, first x^2, ...], multiplied one by one so that nothing overflows before the last term."""
    terms = [first]
    for _ in range(count - 1):
        terms.append(terms[-1] * x)
    return terms


def _gather(terms: list[Tensor], coefficients: Tensor) -> Tensor:
    """Sum [..., G, W] summands to the shape and dtype of their coefficients; a shared row gets the sum over all."""
    if not terms:
        return torch.zeros_like(coefficients)
    summed = [*range(terms[0].dim() - 2), -1] + ([-2] if coefficients.shape[0] == 1 else [])
    columns = [term.sum(summed).reshape(coefficients.shape[0]) for term in terms]
    return torch.stack(columns, dim=-1).to(coefficients.dtype)


def _limits(x: Tensor, a: list[Tensor], b: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Describe F for x -> +inf or -inf, by the sign of x, from the highest non-zero coefficients of P and Q.

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
