"""Compare grkan's figures with bars.yaml: `make bars`, or `make bars JSON="ops.json kernels.json"`.

Without files, every suite in bars.yaml is run first, which takes a quarter of an hour in all. Files are those that
`grkan bench --json` writes; their figures are compared with the bars of their suites. The exit status is 1 if a bar is
missed, or has no figure because a rival could not take part.
"""

import argparse
import itertools
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from grkan.bench import Ratio, run_kernels, run_suite

BARS: dict[str, list[dict[str, Any]]] = yaml.safe_load(Path(__file__).with_name("bars.yaml").read_text())
"""The bars of each suite."""


@dataclass(frozen=True)
class Verdict:
    """A bar, and the figure to compare with it, or None if it was not measured."""

    bar: Mapping[str, Any]
    figure: float | None

    @property
    def met(self) -> bool:
        if self.figure is None:
            return False
        return self.bar.get("at_least", self.figure) <= self.figure <= self.bar.get("at_most", self.figure)

    @property
    def what(self) -> str:
        """The name of the figure, and its contests."""
        words = self.bar["figure"] + (f", {self.bar['of']}" if "of" in self.bar else "")
        words += f" / {self.bar['to']}" if "to" in self.bar else ""
        where = "; ".join(" or ".join(map(str, _alternatives(value))) for value in self.bar["in"].values())
        return f"{words}; {where}" if where else words

    @property
    def limit(self) -> str:
        return f"≤ {self.bar['at_most']}" if "at_most" in self.bar else f"≥ {self.bar['at_least']}"

    @property
    def result(self) -> tuple[str, str]:
        """The figure, and whether it meets the bar."""
        return "not measured" if self.figure is None else f"{self.figure:.4g}", "met" if self.met else "missed"

    def __str__(self) -> str:
        figure, word = self.result
        return f"{word:6}  {figure:>12}  {self.limit:<7}  {self.what}"


def judge(report: Mapping[str, Any]) -> list[Verdict]:
    """Return the bars of a report's suite, each with its figure in the report."""
    figure_of = _of_kernels if report["suite"] == "kernels" else _of_contests
    return [Verdict(bar, figure_of(bar, report)) for bar in BARS[report["suite"]]]


def _of_contests(bar: Mapping[str, Any], report: Mapping[str, Any]) -> float | None:
    """Return the geometric mean over the contests, or None if a contest or a rival is missing."""
    figures = []
    for values in itertools.product(*map(_alternatives, bar["in"].values())):
        job = dict(zip(bar["in"], values, strict=True))
        rivals: Mapping[str, Any] = next(
            (c["rivals"] for c in report["contests"] if job.items() <= c["job"].items()), {}
        )
        if not {bar["of"], bar.get("to", bar["of"])} <= rivals.keys():
            return None
        if "to" not in bar:
            figures.append(rivals[bar["of"]][bar["figure"]])
            continue
        one, other = rivals[bar["of"]], rivals[bar["to"]]
        if bar["figure"] == "least time":
            figures.append(Ratio.of(one["seconds"], other["seconds"]).minima)
        elif bar["figure"] == "time":
            figures.append(Ratio.of(one["seconds"], other["seconds"]).median)
        else:
            figures.append(one[bar["figure"]] / other[bar["figure"]])
    return statistics.geometric_mean(figures)


def _of_kernels(bar: Mapping[str, Any], report: Mapping[str, Any]) -> float | None:
    """Return the worst figure of the kernels that the bar selects, or None if there are no such kernels."""
    kernels = [
        kernel
        for kernel in report["kernels"]
        if all(kernel[name] in _alternatives(value) for name, value in bar["in"].items())
    ]
    figures = [kernel[bar["figure"]] / (kernel[bar["to"]] if "to" in bar else 1) for kernel in kernels]
    return (max if "at_most" in bar else min)(figures, default=None)


def _alternatives(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure if there are no files, print each verdict, and return the exit status."""
    parser = argparse.ArgumentParser(prog="bars.py", description="Compare grkan's figures with bars.yaml.")
    parser.add_argument(
        "files", nargs="*", metavar="FILE", help="a file that `grkan bench --json` wrote (default: measure now)"
    )
    files = parser.parse_args(arguments).files
    with tempfile.TemporaryDirectory() as folder:
        if not files:
            for suite in BARS:
                files.append(Path(folder, f"{suite}.json"))
                if suite == "kernels":
                    run_kernels(path=files[-1])
                else:
                    run_suite(suite, path=files[-1], threads=1 if suite == "deploy" else None)
        reports = [json.loads(Path(file).read_text()) for file in files]
    if any("gpu" in report for report in reports):
        parser.error("the bars are those of a CPU, and this was measured on a GPU")
    verdicts = []
    for report in reports:
        print(", ".join(f"{key} {value}" for key, value in report.items() if not isinstance(value, (list, dict))))
        for verdict in judge(report):
            print(verdict)
            verdicts.append(verdict)
    missed = sum(not verdict.met for verdict in verdicts)
    print(f"{missed} of {len(verdicts)} bars are missed" if missed else f"all {len(verdicts)} bars are met")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
