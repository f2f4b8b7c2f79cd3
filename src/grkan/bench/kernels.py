"""Count registers, spills and so on of the compiled GPU kernels, for GPUs that need not be present.

All counts come from the code that Triton compiles: NVIDIA's by the disassembler that comes with Triton, AMD's from its
assembly. Times are estimates by the roofline of three GPUs. Triton is imported only where something is compiled.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from ..errors import GrkanImportError, GrkanRuntimeError
from ..rational import dispatch

if TYPE_CHECKING:
    from triton.compiler import CompiledKernel

TARGETS: dict[str, tuple[str, int | str, int]] = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
"""The arguments of Triton's GPUTarget: backend, architecture, and lanes per warp."""

TENSORS = {"forward": 2, "backward": 3, "backward with F": 4}
"""The kernels, and the number of tensors of the size of x that each reads or writes."""

DTYPES = {"bfloat16": ("bf16", 2), "float16": ("fp16", 2), "float32": ("fp32", 4), "float64": ("fp64", 8)}
"""Triton's name and the bytes of each dtype."""

LARGE = 2**31
"""Scalars of a tensor whose chunks are as long as they get."""


@dataclass(frozen=True)
class Rates:
    """The peak rates of a GPU per second, from its maker's data: bytes of memory, and instructions of single lanes.

    `arithmetic` is the rate of float32 additions and multiplications, fused or not; `issue` is that of all
    instructions.
    """

    gpu: str
    memory: float
    issue: float
    arithmetic: float
    source: str


RATES = {
    "sm_80": Rates(
        "A100 SXM 80 GB", 2.039e12, 108 * 128 * 1.41e9, 108 * 64 * 1.41e9,
        "NVIDIA A100 Tensor Core GPU, data sheet and architecture white paper",
    ),
    "sm_90": Rates(
        "H100 SXM", 3.35e12, 132 * 128 * 1.98e9, 132 * 128 * 1.98e9,
        "NVIDIA H100 Tensor Core GPU, data sheet and architecture white paper",
    ),
    "gfx942": Rates(
        "MI300X", 5.3e12, 304 * 64 * 2.1e9, 304 * 64 * 2.1e9,
        "AMD Instinct MI300X, data sheet; AMD CDNA 3 architecture white paper",
    ),
}  # fmt: skip
"""Multiprocessors x lanes x clock. Each of four schedulers issues one warp's instruction a cycle; the A100 has half as
many units for float32. With two operations each they are the makers' 19.5 and 66.9 TFLOPS, and half of AMD's 163.4,
where each instruction is a packed one, of two scalars; here it counts as one."""

# The prefixes of instructions: NVIDIA's, and AMD's.
_LOADS = re.compile(r"LDG|global_load|buffer_load")
_STORES = re.compile(r"STG|global_store|buffer_store")
_ATOMICS = re.compile(r"RED\b|REDG|ATOM|global_atomic|buffer_atomic|flat_atomic")
_BARRIERS = re.compile(r"BAR\b|s_barrier")
_ARITHMETIC = re.compile(r"F(FMA|MUL|ADD)|v_(pk_)?(fma|fmac|mul|add|sub)_f32")

_BITS = {"128": 128, "x4": 128, "64": 64, "x2": 64, "U16": 16, "short": 16, "U8": 8}
"""The width of a load or store by the suffix in its name; without a suffix it has 32 bits."""


@dataclass(frozen=True)
class Stats:
    """The counts of one compiled kernel. `load` and `store` are the widest in the loop, in bits; `stack` is in bytes
    per lane.

    `instructions` are those of the loop per scalar, including range handling. `with_ends` adds the instructions that a
    lane executes once, divided by its share of a chunk. It is an upper bound, because it includes the start and end of
    the float64 path. `bytes` have to be moved per scalar; `sums` are those for the sums of the chunks.
    """

    target: str
    kernel: str
    dtype: str
    form: str
    order: tuple[int, int]
    vector: int
    registers: int
    stack: int
    load: int
    store: int
    atomics: int
    barriers: int
    instructions: float
    with_ends: float
    arithmetic: float
    bytes: float
    sums: float

    def estimate(self) -> tuple[float, str] | None:
        """Estimate scalars per second by the roofline, with the limiting part: "memory", "issue" or "arithmetic"."""
        rates = RATES.get(self.target)
        if rates is None or self.dtype == "float64":
            return None
        found = [
            (rates.memory / self.bytes, "memory"),
            (rates.issue / self.with_ends, "issue"),
            (rates.arithmetic / self.arithmetic, "arithmetic"),
        ]
        return min(found)


@dataclass(frozen=True)
class Published:
    """Published figures of others' kernels, per scalar."""

    name: str
    kernel: str
    figures: str
    source: str


PUBLISHED = (
    Published("FlashKAT", "forward", "20 bytes under autocast to bfloat16", "counted in the code of arXiv 2505.13813"),
    Published(
        "FlashKAT",
        "backward",
        "24 bytes under autocast, 108 instructions, 255 registers, 952 bytes of stack (sm_90)",
        "counted in the code of arXiv 2505.13813, compiled",
    ),
    Published(
        "released Triton kernel",
        "backward",
        "307 instructions, one atomic for each scalar and coefficient (sm_90)",
        "counted in the code of github.com/Adamdad/rational_kat_cu, compiled",
    ),
)


def compile_kernel(
    target: str, kernel: str, dtype: str, form: str, order: tuple[int, int], vector: int | None = None
) -> "CompiledKernel":
    """Compile one kernel as `rational/gpu.py` launches it, for aligned tensors and indices of 32 bits.

    Args:
        target: a key of TARGETS.
        kernel: a key of TENSORS.
        dtype: a key of DTYPES.
        form: "abs_of_sum" or "sum_of_abs".
        order: the degrees m and n.
        vector: scalars per vector; None: 16 bytes, as for widths that are multiples of it.

    Raises:
        ImportError: Triton is missing or too old.
        RuntimeError: Triton's interpreter is on, which compiles nothing.
    """
    gpu = _gpu()
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = gpu.forward_kernel if kernel == "forward" else gpu.backward_kernel
    name, size = DTYPES[dtype]
    gpu_target = GPUTarget(*TARGETS[target])
    _, warps = gpu.program(LARGE, kernel != "forward")
    constants = {
        "M": order[0],
        "N": order[1],
        "ABSOLUTE": form == "sum_of_abs",
        "LANES": warps * gpu_target.warp_size,
        "VECTOR": vector or gpu.VECTOR_BYTES // size,
        "LONG": False,
    }
    if kernel != "forward":
        constants["OUTPUT"] = kernel == "backward with F"
    coefficients = "*fp64" if dtype == "float64" else "*fp32"
    pointers = {"a_ptr": coefficients, "b_ptr": coefficients, "sums_ptr": "*fp64"}
    pointers |= {f"{t}_ptr": f"*{name}" for t in ("x", "grad", "y", "dx")}
    signature = {n: "constexpr" if n in constants else pointers.get(n, "i32") for n in function.arg_names}
    aligned = {(function.arg_names.index(n),): [["tt.divisibility", 16]] for n in pointers if n in function.arg_names}
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=gpu_target, options={"num_warps": warps})


def _gpu() -> ModuleType:
    """Import the module of the kernels, or raise an error that says what is wrong with Triton."""
    try:
        import triton

        if problem := dispatch.why_too_old(triton.__version__):
            raise GrkanImportError(problem)
        if triton.knobs.runtime.interpret:
            raise GrkanRuntimeError("Triton's interpreter is on, and compiles nothing; unset TRITON_INTERPRET")
        from ..rational import gpu
    except ImportError as error:
        raise GrkanImportError(
            f"grkan bench kernels needs Triton; install it with: {dispatch.TRITON_COMMAND} ({error})"
        ) from error
    return gpu


def assembly(compiled: "CompiledKernel") -> str:
    """Return the assembly code of a kernel from `compile_kernel`."""
    if "cubin" in compiled.asm:
        return _run_on_cubin("nvdisasm", "-c", compiled.asm["cubin"])
    return str(compiled.asm["amdgcn"])


def stats(target: str, kernel: str, dtype: str, form: str, order: tuple[int, int], vector: int | None = None) -> Stats:
    """Compile one kernel and return its counts; the arguments are those of `compile_kernel`."""
    compiled = compile_kernel(target, kernel, dtype, form, order, vector)
    code = assembly(compiled)
    if "cubin" in compiled.asm:
        registers, stack, loops, outside = _read_nvidia(code, compiled.asm["cubin"])
    else:
        registers, stack, loops, outside = _read_amd(code)
    size = DTYPES[dtype][1]
    vector = vector or _gpu().VECTOR_BYTES // size
    loop = loops[0]
    chunk, warps = _gpu().program(LARGE, kernel != "forward")
    share = chunk / (warps * TARGETS[target][2])
    # Each sum of a chunk is written and read once, as float64.
    sums = 0.0 if kernel == "forward" else 16 * (order[0] + 1 + order[1]) / chunk
    instructions = len(loop) / vector
    return Stats(
        target, kernel, dtype, form, order, vector, registers, stack,
        load=_widest(loop, _LOADS),
        store=_widest(loop, _STORES),
        atomics=sum(bool(_ATOMICS.match(i)) for i in [*outside, *(i for body in loops for i in body)]),
        barriers=sum(bool(_BARRIERS.match(i)) for i in loop),
        instructions=instructions,
        with_ends=instructions + len(outside) / share,
        arithmetic=sum(bool(_ARITHMETIC.match(i)) for i in loop) / vector,
        bytes=TENSORS[kernel] * size + sums,
        sums=sums,
    )  # fmt: skip


def _widest(loop: list[str], wanted: "re.Pattern[str]") -> int:
    found = [i for i in loop if wanted.match(i)]
    sizes = [next((bits for mark, bits in _BITS.items() if re.search(rf"(\.|dword|_){mark}\b", i)), 32) for i in found]
    return max(sizes, default=0)


def _run_on_cubin(tool: str, option: str, cubin: bytes) -> str:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        return subprocess.run([str(tools / tool), option, str(path)], capture_output=True, text=True, check=True).stdout


def _read_nvidia(code: str, cubin: bytes) -> tuple[int, int, list[list[str]], list[str]]:
    """Return registers, bytes of stack, the instructions of the outermost loops, and those outside of loops."""
    found = re.search(r"REG:(\d+) STACK:(\d+)", _run_on_cubin("cuobjdump", "--dump-resource-usage", cubin))
    assert found is not None
    instruction = r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(?:.*`\((\.L_\w+)\))?"
    instructions, backward = _scan(code, r"\s*(\.L_\w+):", instruction, "BRA")
    return int(found[1]), int(found[2]), *_cut(instructions, backward, "NOP")


def _read_amd(code: str) -> tuple[int, int, list[list[str]], list[str]]:
    """Return the same from AMD's assembly; spills count as stack."""

    def value(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", code)
        assert found is not None
        return int(found[1])

    spilled = 4 * (value("vgpr_spill_count") + value("sgpr_spill_count"))
    instructions, backward = _scan(code, r"(\.LBB\w+):", r"\s+([a-z]+_[a-z0-9_]+)(?:\s+(\.LBB\w+))?", "s_")
    registers = value("vgpr_count") + value("agpr_count")
    return registers, max(spilled, value("private_segment_fixed_size")), *_cut(instructions, backward, "s_nop")


def _scan(code: str, label: str, instruction: str, jump: str) -> tuple[list[str], list[tuple[int, int]]]:
    """Return the instructions, and the backward jumps as (target, origin).

    Args:
        label, instruction: patterns for the start of a line with a label or an instruction. The groups are the label,
            or the instruction and its target.
        jump: the prefix of instructions that jump to their target; others only name it.
    """
    instructions: list[str] = []
    labels: dict[str, int] = {}
    jumps: dict[int, str] = {}
    for line in code.splitlines():
        if found := re.match(label, line):
            labels[found[1]] = len(instructions)
        elif found := re.match(instruction, line):
            if found[2] and found[1].startswith(jump):
                jumps[len(instructions)] = found[2]
            instructions.append(found[1])
    return instructions, [(labels[goal], at) for at, goal in jumps.items() if labels.get(goal, at) < at]


def _cut(instructions: list[str], backward: list[tuple[int, int]], nothing: str) -> tuple[list[list[str]], list[str]]:
    """Split the code at its backward jumps (target, origin) into the outermost loops that load, and the rest."""
    merged: list[list[int]] = []
    for start, end in sorted(backward):
        if merged and start <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([start, end])
    loops = [[i for i in instructions[start : end + 1] if i != nothing] for start, end in merged]
    inside = {i for start, end in merged for i in range(start, end + 1)}
    outside = [op for i, op in enumerate(instructions) if i not in inside and op != nothing]
    return [loop for loop in loops if any(_LOADS.match(i) for i in loop)], outside


def all_cases() -> Iterator[tuple[str, str, str, str, tuple[int, int]]]:
    """Yield the arguments of `stats` for `grkan bench kernels`: all that models use, and one of each other kind."""
    for target in TARGETS:
        for kernel in TENSORS:
            for dtype in DTYPES:
                common = dtype in ("bfloat16", "float32")
                for order in ((5, 4), (7, 6)) if common else ((5, 4),):
                    both = common and kernel != "backward with F"
                    for form in ("abs_of_sum", "sum_of_abs") if both else ("abs_of_sum",):
                        yield target, kernel, dtype, form, order
