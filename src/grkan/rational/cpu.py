"""The C++ kernel of `csrc/`, in the form that `op.py` wants: float16 to float64 on the CPU, any order, both forms.

It is built when grkan is installed with a compiler and PyTorch at hand, and loaded here. It picks AVX-512, AVX2 or
portable vectors when it is first called; PyTorch's variable ATEN_CPU_CAPABILITY (default, avx2, avx512) asks for less
than the machine has.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LIBRARY = Path(__file__).parents[1] / "_C.abi3.so"

# The library's two operators, without what Python puts around an operator: 1 us of the 10 that a small call takes.
_forward: Callable[..., Tensor]
_backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


def load() -> bool:
    """Make the operators grkan::cpu_forward and grkan::cpu_backward known to PyTorch; False if they were not built.

    Raises:
        OSError: the library is there and cannot be loaded; the message says why.
    """
    global _forward, _backward
    if not LIBRARY.exists():
        return False
    torch.ops.load_library(str(LIBRARY))
    operators: Any = torch.ops.grkan
    _forward, _backward = operators.cpu_forward.default._op, operators.cpu_backward.default._op
    return True


def forward(x: Tensor, numerator: Tensor, denominator: Tensor, form: str, width: int) -> Tensor:
    """F(x), see `op.Kernel`."""
    if not _are_readable(numerator, denominator):
        numerator, denominator = _readable(numerator), _readable(denominator)
    return _forward(x, numerator, denominator, form == "sum_of_abs", width)


def backward(
    grad: Tensor, x: Tensor, numerator: Tensor, denominator: Tensor, form: str, width: int, output: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The gradients, and with `output` F(x) from the same pass over x; see `op.Kernel`."""
    y = torch.empty_like(x) if output else None
    if _are_readable(numerator, denominator):
        dx, da, db = _backward(grad, x, numerator, denominator, form == "sum_of_abs", width, y)
        return dx, da, db, y
    a, b = _readable(numerator), _readable(denominator)
    dx, da, db = _backward(grad, x, a, b, form == "sum_of_abs", width, y)
    return dx, da.to(numerator.dtype), db.to(denominator.dtype), y


def _are_readable(numerator: Tensor, denominator: Tensor) -> bool:
    """Whether the library takes them as they are: contiguous, float32 or float64."""
    return (
        numerator.itemsize >= 4
        and denominator.itemsize >= 4
        and numerator.is_contiguous()
        and denominator.is_contiguous()
    )


def _readable(coefficients: Tensor) -> Tensor:
    return (coefficients if coefficients.itemsize >= 4 else coefficients.float()).contiguous()
