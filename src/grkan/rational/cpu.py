"""The C++ kernel of `csrc/`, wrapped for `op.py`: float16 to float64 on the CPU, any order, both forms.

The library has the C interface of `csrc/grkan.h` and does not depend on PyTorch. It takes addresses and sizes, and
PyTorch's function `torch_parallel_for`, with which it runs its work on PyTorch's threads. On its first call it picks
AVX-512, AVX2 or portable vectors; PyTorch's variable ATEN_CPU_CAPABILITY (default, avx2, avx512) can ask for less than
the machine has.
"""

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import GrkanRuntimeError, GrkanValueError

LIBRARY = Path(__file__).parents[1] / "libgrkan.so"

_INTERFACE = 1  # kGrkanInterface of csrc/grkan.h
_TYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}

_forward: Callable[..., bytes | None]
_backward: Callable[..., bytes | None]
_parallel_for: int


def load() -> bool:
    """Load the library. Return False if it was not built.

    Raises:
        OSError: the library exists but cannot be used; the message says why.
    """
    global _forward, _backward, _parallel_for
    if not LIBRARY.exists():
        return False
    forward, backward = functions_of(LIBRARY)
    # torch._C is linked with libtorch_cpu, so the symbol is found through it, wherever that library lies.
    threads: Any = ctypes.CDLL(torch._C.__file__).torch_parallel_for  # of PyTorch's stable C interface, since 2.10
    _forward, _backward, _parallel_for = forward, backward, ctypes.cast(threads, ctypes.c_void_p).value or 0
    return True


def functions_of(path: Path) -> tuple[Callable[..., bytes | None], Callable[..., bytes | None]]:
    """Load a library of the kernel, and return its functions `grkan_forward` and `grkan_backward`.

    Raises:
        OSError: it cannot be used; the message says why.
    """
    library = ctypes.CDLL(str(path))
    try:
        interface, forward, backward = library.grkan_interface(), library.grkan_forward, library.grkan_backward
    except AttributeError as error:
        raise OSError(str(error)) from error
    if interface != _INTERFACE:
        raise OSError(f"{path} was built for another version of grkan")
    for function, count in ((forward, 15), (backward, 19)):
        # Pass every 64-bit value as an address: ctypes converts those twice as fast as integers.
        function.argtypes = [ctypes.c_void_p] * count
        function.restype = ctypes.c_char_p
    return forward, backward


def forward(x: Tensor, numerator: Tensor, denominator: Tensor, form: str, width: int) -> Tensor:
    """Compute F(x), see `dispatch.Kernel`."""
    if not _are_readable(numerator, denominator):
        numerator, denominator = _readable(numerator), _readable(denominator)
    y = torch.empty_like(x)
    problem = _forward(
        _parallel_for,
        _TYPES[x.dtype],
        x.numel(),
        width,
        form == "sum_of_abs",
        numerator.data_ptr(),
        _TYPES[numerator.dtype],
        *numerator.shape,
        denominator.data_ptr(),
        _TYPES[denominator.dtype],
        *denominator.shape,
        x.data_ptr(),
        y.data_ptr(),
    )
    if problem is not None:
        raise _error(problem)
    return y


def backward(
    grad: Tensor, x: Tensor, numerator: Tensor, denominator: Tensor, form: str, width: int, output: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Compute the gradients and, if `output` is true, F(x) in the same pass over x; see `dispatch.Kernel`."""
    if grad.shape != x.shape or grad.dtype != x.dtype or not grad.is_cpu:
        raise GrkanValueError(
            f"grad must be like x, {x.dtype} of shape {tuple(x.shape)} on the CPU; "
            f"got {grad.dtype} of shape {tuple(grad.shape)} on {grad.device}"
        )
    a, b = numerator, denominator
    readable = _are_readable(a, b)
    if not readable:
        a, b = _readable(a), _readable(b)
    dx, da, db = torch.empty_like(x), torch.empty_like(a), torch.empty_like(b)
    y = torch.empty_like(x) if output else None
    problem = _backward(
        _parallel_for,
        _TYPES[x.dtype],
        x.numel(),
        width,
        form == "sum_of_abs",
        a.data_ptr(),
        _TYPES[a.dtype],
        *a.shape,
        b.data_ptr(),
        _TYPES[b.dtype],
        *b.shape,
        grad.data_ptr(),
        x.data_ptr(),
        dx.data_ptr(),
        da.data_ptr(),
        db.data_ptr(),
        None if y is None else y.data_ptr(),
    )
    if problem is not None:
        raise _error(problem)
    if readable:
        return dx, da, db, y
    return dx, da.to(numerator.dtype), db.to(denominator.dtype), y


def _error(problem: bytes) -> Exception:
    return GrkanRuntimeError(f"the CPU kernel: {problem.decode()}")


def _are_readable(numerator: Tensor, denominator: Tensor) -> bool:
    """Whether the library can read the coefficients directly: they are contiguous, float32 or float64."""
    return (
        numerator.itemsize >= 4
        and denominator.itemsize >= 4
        and numerator.is_contiguous()
        and denominator.is_contiguous()
    )


def _readable(coefficients: Tensor) -> Tensor:
    return (coefficients if coefficients.itemsize >= 4 else coefficients.float()).contiguous()
