"""Results of benchmarks, as tables for readers and as JSON for programs."""

import json
import os
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from .._version import __version__
from ..rational import dispatch
from ..writing import write_bytes
from .contest import Ratio, Result
from .kernels import PUBLISHED, RATES, Stats

RATE_COLUMNS = {"images per second": ("images/s", 1.0), "bytes per second": ("GB/s", 1e9)}
"""The column title and the unit of each rate of a Result."""

KERNELS_LEGEND = (
    "registers, and bytes of stack, a lane; bits of the widest load and store; instructions a scalar: in the loop, and "
    "with what is around it (at most); bytes a scalar. An estimate is 10^9 scalars a second, and their limit; nothing "
    "was run on a GPU for this table."
)


# Where it was measured.


def describe_machine(device: str = "cpu") -> dict[str, Any]:
    """Describe the machine and the versions that the figures depend on."""
    return {
        **({"gpu": torch.cuda.get_device_name(), "triton": _triton_version()} if device == "cuda" else {}),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "native kernel": dispatch.find_kernel(device) is not None,
        "grkan": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        # The load of other programs just before: two busy cores make figures of two threads worthless.
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def describe_compiler() -> dict[str, Any]:
    """Describe the versions for kernels that were only compiled."""
    versions = {"grkan": __version__, "triton": _triton_version(), "torch": torch.__version__}
    return {**versions, "python": platform.python_version()}


def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return str(triton.__version__)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


# Tables.


def contest_tables(result: Result) -> Iterator[Table]:
    """Yield a table of a contest's times, and one of other facts about its rivals, if there are any."""
    times = _table(f"{job_title(result.job)}; ratios to {result.baseline}", left=[""])
    columns = [RATE_COLUMNS[name][0] for name in result.rates(result.baseline)]
    for column in ("median", "minimum", "ratio", "quartiles", "of minima", *columns):
        times.add_column(column, justify="right")
    for name, measured in result.measurements.items():
        rates = [f"{rate / RATE_COLUMNS[key][1]:.1f}" for key, rate in result.rates(name).items()]
        times.add_row(
            name, format_time(measured.median), format_time(measured.minimum), *_cells(result.ratio(name)), *rates
        )
    yield times
    if result.facts[result.baseline]:
        facts = _table(None, left=[""], right=result.facts[result.baseline])
        for name, values in result.facts.items():
            facts.add_row(
                name, *(f"{value:,}" if isinstance(value, int) else f"{value:.2g}" for value in values.values())
            )
        yield facts


def kernel_tables(found: Sequence[Stats]) -> Iterator[Table]:
    """Yield a table for each target, and one of others' kernels."""
    for target in dict.fromkeys(s.target for s in found):
        title = target
        if rates := RATES.get(target):
            title += (
                f"; estimate for {rates.gpu}: {rates.memory / 1e12:.3g} TB/s, {rates.issue / 1e12:.3g} T "
                f"instructions/s, {rates.arithmetic / 1e12:.3g} T of float32 arithmetic"
            )
        counted = ("registers", "stack", "bits", "atomics", "barriers", "instructions", "bytes", "estimate")
        table = _table(title, left=("kernel", "dtype", "order", "form"), right=counted)
        for s in found:
            if s.target == target:
                table.add_row(*_kernel_cells(s))
        yield table
    others = _table("others' kernels", left=("kernel", "pass", "a scalar", "source"))
    for other in PUBLISHED:
        others.add_row(other.name, other.kernel, other.figures, other.source)
    yield others


def _kernel_cells(s: Stats) -> Iterator[str]:
    yield from (s.kernel, s.dtype, f"({s.order[0]},{s.order[1]})", s.form)
    yield from (str(s.registers), str(s.stack), f"{s.load}/{s.store}", str(s.atomics), str(s.barriers))
    yield f"{s.instructions:.1f} ({s.with_ends:.1f})"
    yield f"{s.bytes:.2f}"
    estimate = s.estimate()
    yield f"{estimate[0] / 1e9:.0f}, {estimate[1]}" if estimate else ""


def _table(title: str | None, left: Sequence[str], right: Iterable[str] = ()) -> Table:
    """Make an empty table with left-aligned columns of words and right-aligned columns of figures."""
    table = Table(title=title, title_justify="left")
    for column in left:
        table.add_column(column)
    for column in right:
        table.add_column(column, justify="right")
    return table


def job_title(job: Mapping[str, Any]) -> str:
    """Describe the job of a contest in words."""
    return ", ".join(f"{key} {value}" if isinstance(value, int) else str(value) for key, value in job.items())


def as_line(about: Mapping[str, Any]) -> str:
    """Format the command, the machine and the versions as one line."""
    return ", ".join(f"{key} {value}" for key, value in about.items())


def _cells(ratio: Ratio) -> tuple[str, str, str]:
    return (
        format_ratio(ratio.median),
        f"{format_ratio(ratio.low)}-{format_ratio(ratio.high)}",
        format_ratio(ratio.minima),
    )


def format_ratio(ratio: float) -> str:
    """Format a ratio with at least three digits."""
    return f"{ratio:#.3g}".rstrip(".") if ratio < 1000 else f"{ratio:.0f}"


def format_time(seconds: float) -> str:
    """Format a time in the unit that suits it."""
    unit, factor = ("s", 1) if seconds >= 1 else ("ms", 1e3) if seconds >= 1e-3 else ("µs", 1e6)
    return f"{format_ratio(seconds * factor)} {unit}"


# JSON.


def contest_as_json(result: Result) -> dict[str, Any]:
    """Return every time of every round, and the figures of the tables."""
    rivals = {}
    for name, measured in result.measurements.items():
        figures: dict[str, Any] = {"median": measured.median, "minimum": measured.minimum, **result.rates(name)}
        ratio = {"ratio": asdict(result.ratio(name))}
        rivals[name] = {**figures, **ratio, **result.facts[name], **asdict(measured)}
    return {"job": dict(result.job), "baseline": result.baseline, "rivals": rivals}


def kernels_as_json(found: Sequence[Stats]) -> dict[str, Any]:
    """Return the figures and estimate of each kernel, and the sources of the estimates and of others' figures."""
    kernels = []
    for s in found:
        estimate = s.estimate()
        limit = estimate and {"scalars per second": estimate[0], "limit": estimate[1]}
        kernels.append({**asdict(s), "estimate": limit})
    rates = {target: asdict(rates) for target, rates in RATES.items()}
    return {"rates": rates, "kernels": kernels, "others": [asdict(other) for other in PUBLISHED]}


def write_json(path: str | Path, suite: str, about: Mapping[str, Any], figures: Mapping[str, Any]) -> None:
    """Write the report on a suite to a file.

    Raises:
        OSError: the file cannot be written.
    """
    write_bytes(path, (json.dumps({"suite": suite, **about, **figures}, indent=1) + "\n").encode())
