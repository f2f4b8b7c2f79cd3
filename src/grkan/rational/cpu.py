"""The C++ kernel of `csrc/`, in the form that `op.py` wants: float16 to float64 on the CPU, any order, both forms.

It is built when grkan is installed with a compiler and PyTorch at hand, and loaded here. It picks AVX-512, AVX2 or
portable vectors when it is first called; PyTorch's variable ATEN_CPU_CAPABILITY (default, avx2, avx512) asks for less
than the machine has.
"""

from pathlib import Path

import torch
from torch import Tensor

LIBRARY = Path(__file__).parents[1] / "_C.abi3.so"


def load() -> bool:
    """Make the operators grkan::cpu_forward and grkan::cpu_backward known to PyTorch; False if they were not built.

    Raises:
        OSError: the library is there and cannot be loaded; the message says why.
    """
    if not LIBRARY.exists():
        return False
    torch.ops.load_library(str(LIBRARY))
    return True


def forward(x: Tensor, numerator: Tensor, denominator: Tensor, form: str, width: int) -> Tensor:
    """F(x), see `op.Kernel`."""
    return torch.ops.grkan.cpu_forward.default(x, _wide(numerator), _wide(denominator), form == "sum_of_abs", width)


def backward(
    grad: Tensor, x: Tensor, numerator: Tensor, denominator: Tensor, form: str, width: int, output: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The gradients, and with `output` F(x) from the same pass over x; see `op.Kernel`."""
    y = torch.empty_like(x) if output else None
    dx, da, db = torch.ops.grkan.cpu_backward.default(
        grad, x, _wide(numerator), _wide(denominator), form == "sum_of_abs", width, y
    )
    return dx, _narrow(da, numerator), _narrow(db, denominator), y


def _wide(coefficients: Tensor) -> Tensor:
    """Contiguous, float32 or float64."""
    if coefficients.itemsize < 4:
        coefficients = coefficients.float()
    return coefficients.contiguous()


def _narrow(gradient: Tensor, coefficients: Tensor) -> Tensor:
    return gradient if gradient.dtype == coefficients.dtype else gradient.to(coefficients.dtype)
