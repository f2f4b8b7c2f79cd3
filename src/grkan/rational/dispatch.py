"""Which kernel computes: the kernels by device type, and the choice of a backend."""

import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ..errors import GrkanRuntimeError
from . import cpu, reference
from .arguments import check_choice

_BACKENDS = ("auto", "reference", "native")

TRITON = (3, 6)
"""The oldest Triton that the GPU kernel works with: the one of the oldest PyTorch that grkan supports."""

_TRITON = ".".join(map(str, TRITON))
TRITON_COMMAND = f'pip install "triton>={_TRITON}"'
BUILD_COMMAND = "pip install --force-reinstall --no-deps ."


@dataclass(frozen=True)
class Kernel:
    """F and its gradients on one device type.

    forward(x, numerator, denominator, form, width) returns F(x).
    backward(grad, x, numerator, denominator, form, width, output) returns the gradients of x, numerator and
    denominator, and as a fourth result F(x) if `output` is true, else None.

    x and grad may have any shape, but both lie in memory as [rows, groups, width], without gaps. Results of their shape
    have the strides of `empty_like(x)`. The number of groups is the larger number of rows of the coefficients.
    """

    forward: Callable[..., Tensor]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor | None]]


KERNELS: dict[str, Kernel] = {}
"""Native kernels by device type: "cpu" and "cuda" (PyTorch's name for AMD's GPUs, too). Other devices use the
reference. "xpu" is left out: extreme x are computed in float64, which not all of Intel's GPUs have."""

_gpu_kernel_wanted = False
_why_no_gpu_kernel = ""
_noticed: set[str] = set()  # the device types for which a missing kernel was reported


class _Thread(threading.local):
    """The backend of the innermost `with set_backend(...)` block of a thread."""

    def __init__(self) -> None:
        self.backend: str | None = None


_thread = _Thread()
_backend_of_process = "auto"
_calls: list["set_backend"] = []  # of set_backend outside of `with`; the last one applies to the process
_CALLS_KEPT = 16


def _reference_forward(x: Tensor, numerator: Tensor, denominator: Tensor, form: str, width: int) -> Tensor:
    groups = max(numerator.shape[0], denominator.shape[0])
    y = reference.rational(_canonical(x, groups, width), numerator, denominator, form)
    return y.as_strided(x.shape, x.stride())


def _reference_backward(
    grad: Tensor, x: Tensor, numerator: Tensor, denominator: Tensor, form: str, width: int, output: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    groups = max(numerator.shape[0], denominator.shape[0])
    grad, z = (_canonical(t, groups, width) for t in (grad, x))
    dx, da, db = reference.rational_backward(grad, z, numerator, denominator, form)
    y = _reference_forward(x, numerator, denominator, form, width) if output else None
    return dx.as_strided(x.shape, x.stride()), da, db, y


def _canonical(t: Tensor, groups: int, width: int) -> Tensor:
    rows = t.numel() // max(groups * width, 1)
    return t.as_strided((rows, groups, width), (groups * width, width, 1))


REFERENCE = Kernel(_reference_forward, _reference_backward)


def _load_cpu_kernel() -> None:
    try:
        if cpu.load():
            KERNELS["cpu"] = Kernel(cpu.forward, cpu.backward)
    except OSError as error:
        warnings.warn(
            f"grkan's kernel cannot be loaded, so plain PyTorch operations compute F: {error}; to rebuild the kernel, "
            f"run this in the folder of grkan's source: {BUILD_COMMAND}",
            RuntimeWarning,
            stacklevel=2,
        )


_load_cpu_kernel()


def _load_gpu_kernel() -> None:
    global _why_no_gpu_kernel
    try:
        import triton

        _why_no_gpu_kernel = why_too_old(triton.__version__)
        if _why_no_gpu_kernel:
            return
        from . import gpu

        if torch.cuda.is_available():
            _persist(gpu.try_out)
    except Exception as error:  # Triton calls compilers and drivers, and each can fail in its own way
        missing = isinstance(error, ModuleNotFoundError) and error.name == "triton"
        problem = "Triton is missing" if missing else f"Triton does not work: {type(error).__name__}: {error}"
        _why_no_gpu_kernel = f"{problem}; version {_TRITON} or newer is needed"
    else:
        KERNELS["cuda"] = Kernel(gpu.forward, gpu.backward)


def _persist(act: Callable[[], None]) -> None:
    """Call `act` up to three times: it can fail while other processes compile the same kernel into Triton's cache."""
    for pause in (0.2, 1.0):
        try:
            return act()
        except Exception:
            time.sleep(pause)
    return act()


def why_too_old(triton_version: str) -> str:
    """Return the reason why a Triton older than TRITON is refused, or an empty string for a newer one."""
    old = tuple(int(part) for part in triton_version.split(".")[:2]) < TRITON
    return f"Triton is version {triton_version}, and {_TRITON} or newer is needed" if old else ""


def find_kernel(device_type: str) -> Kernel | None:
    """Return the kernel of a device type, or None. Load the GPU kernel on first use: importing Triton takes 0.5 s."""
    global _gpu_kernel_wanted
    if device_type == "cuda" and not _gpu_kernel_wanted:
        _gpu_kernel_wanted = True
        _load_gpu_kernel()
    return KERNELS.get(device_type)


class set_backend:
    """Choose what computes the rational function: for the process, or in a `with` block for the thread that runs it.

    A plain call applies to every thread from then on. A `with` block overrides it in its own thread until the block
    ends.

    Args:
        name: "auto", the native kernel where there is one and the reference elsewhere; "reference", plain PyTorch
            operations, differentiated by autograd, which any exporter understands; "native", the kernel or an error.

    Raises:
        TypeError, ValueError: for another name.
        RuntimeError: for "native" if this installation has no kernel. With "native", computing on a device without a
            kernel raises it, too.
    """

    def __init__(self, name: str) -> None:
        check_choice("backend", name, _BACKENDS)
        if name == "native" and not KERNELS and not (torch.cuda.is_available() and find_kernel("cuda")):
            for_gpu = f"; for the GPU, {_why_no_gpu_kernel}: {TRITON_COMMAND}" if torch.cuda.is_available() else ""
            raise GrkanRuntimeError(
                "backend 'native' is not available: this installation of grkan has no compiled kernel; use 'auto' or "
                f"'reference', or build the kernel: run this in the folder of grkan's source: {BUILD_COMMAND}{for_gpu}"
            )
        self.name = name
        # Until `__enter__` runs, a block looks like a plain call. Then it removes itself, whatever other threads do.
        _calls.append(self)
        del _calls[1:-_CALLS_KEPT]
        _settle()

    def __enter__(self) -> "set_backend":
        if self in _calls:
            _calls.remove(self)
            _settle()
        self._outer, _thread.backend = _thread.backend, self.name
        return self

    def __exit__(self, *_: object) -> None:
        _thread.backend = self._outer


def _settle() -> None:
    """Apply the last call. torch.compile could not trace a lock: a thread that wrote an outdated name writes again."""
    global _backend_of_process
    while _backend_of_process != _calls[-1].name:
        _backend_of_process = _calls[-1].name


set_backend("auto")  # is never removed


def backend() -> str:
    """Return the name of the backend that applies here and now."""
    # Do not read the list here: a compiled graph would be guarded by its length.
    return _thread.backend or _backend_of_process


def check_backend(device_type: str) -> None:
    """Raise an error, or warn, if the backend needs a kernel that this device type does not have."""
    # For a GPU, do not check while compiling: the graph would be guarded by whether the GPU kernel is loaded. The
    # operator in the graph checks when it runs.
    if device_type == "meta" or backend() == "reference" or (device_type != "cpu" and is_compiling()):
        return
    kernel_for(device_type, stacklevel=5)


def kernel_for(device_type: str, stacklevel: int = 2) -> Kernel:
    """Return the native kernel, or else the reference: with a warning if that is slow, an error for "native"."""
    kernel = find_kernel(device_type)
    if kernel is not None:
        return kernel
    how = f"; {_why_no_gpu_kernel}: {TRITON_COMMAND}" if device_type == "cuda" and _why_no_gpu_kernel else ""
    if backend() == "native":
        raise GrkanRuntimeError(
            f"backend 'native' has no kernel for x on device {device_type}; it has kernels for {sorted(KERNELS)}{how}"
        )
    unnoticed = device_type in ("cpu", "cuda") and device_type not in _noticed and not is_compiling()
    if unnoticed and backend() == "auto":
        _noticed.add(device_type)
        if device_type == "cpu":
            how = f"; to build it, you need a C++ compiler; run this in the folder of grkan's source: {BUILD_COMMAND}"
        warnings.warn(
            f"this installation of grkan has no kernel for the {'CPU' if device_type == 'cpu' else 'GPU'}, so plain "
            f"PyTorch operations compute F, about ten times slower{how}",
            RuntimeWarning,
            stacklevel=stacklevel,
        )
    return REFERENCE
