"""Train several models, or variants of one, with the same budget, and put them side by side.

    python -m grkan.train.compare --data digits --models kat_micro_patch2_8 vit_micro_patch2_8 --output runs/digits
    python -m grkan.train.compare --config configs/demo.yaml --output runs/demo

The configuration is that of `grkan train`, and may have a mapping `runs` besides: by name, the settings in which a run
differs from the others. Runs that are finished are not repeated, and an interrupted one goes on where it was.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from ..command import Parser, run
from ..plot import plot_curves, save_figure
from .checkpoint import read_metrics, write_bytes, write_file
from .config import RESUMABLE, Config, add_training_options, make_config, read_yaml, to_dict, training_settings
from .loop import holds_run, resolve, resume, train
from .progress import make_console


def compare(runs: Mapping[str, Mapping[str, Any]], output: str | Path) -> dict[str, dict[str, Any]]:
    """Train each run in the folder `output/NAME`; then write `comparison.json` and `curves.png` beside these folders.

    Args:
        runs: by name, the settings of each, as in `Config`; `output` is not among them.
        output: the folder of all.

    Returns:
        By name, the summary of each run, see `train`.

    Raises:
        ValueError: there is no run, or a folder holds a run with other settings.
        As `train`.
    """
    if not runs:
        raise ValueError("runs must name at least one; give --models or a configuration with runs")
    output = Path(output)
    # All configurations are checked before the first run starts.
    configs = {name: resolve(make_config(settings, {"output": str(output / name)})) for name, settings in runs.items()}
    summaries = {}
    for name, config in configs.items():
        if holds_run(output / name):
            _check_same(config, output / name)
            summaries[name] = resume(output / name)
        else:
            summaries[name] = train(config)
    write_bytes(output / "comparison.json", (json.dumps(summaries, indent=2) + "\n").encode())
    lines = {name: read_metrics(output / name / "metrics.jsonl") for name in runs}
    if any("top1" in line for run in lines.values() for line in run):
        figure = plot_curves(lines)
        write_file(output / "curves.png", lambda path: save_figure(figure, path))
    return summaries


def _check_same(config: Config, folder: Path) -> None:
    recorded = read_yaml(folder / "config.yaml")
    for key, value in to_dict(config).items():
        if key not in (*RESUMABLE, "output") and recorded.get(key) != value:
            raise ValueError(
                f"{folder} holds a run with {key} = {recorded.get(key)!r}, not {value!r}; choose another --output"
            )


def _table(summaries: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table()
    table.add_column("run")
    for column in ("test accuracy", "best epoch", "parameters", "training time"):
        table.add_column(column, justify="right")
    for name, summary in summaries.items():
        table.add_row(
            name,
            f"{summary['last_top1']:.2f} %",
            f"{summary['top1']:.2f} % ({summary['best_epoch']})",
            f"{summary['parameters']:,}",
            f"{summary['seconds']:.0f} s",
        )
    return table


def _main(options: argparse.Namespace) -> None:
    settings = read_yaml(options.config) if options.config else {}
    variants = settings.pop("runs", None) or {}
    if options.models:
        variants = {name: {"model": name} for name in options.models}
    if not isinstance(variants, dict) or not all(isinstance(variant, dict) for variant in variants.values()):
        raise ValueError(f"{options.config}: runs must map names to settings")
    given = training_settings(options)
    runs = {name: _merged(settings, variant, given) for name, variant in variants.items()}
    summaries = compare(runs, options.output)
    console = make_console()
    console.print(_table(summaries))
    pictures = sorted(options.output.glob("*.png"))
    pictures += [path for name in summaries for path in sorted((options.output / name).glob("*.png"))]
    for path in [options.output / "comparison.json", *pictures]:
        console.print(str(path), soft_wrap=True)


def _merged(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Later settings override; model_args are merged."""
    merged: dict[str, Any] = {}
    for layer in layers:
        arguments = {**merged.get("model_args", {}), **layer.get("model_args", {})}
        merged = {**merged, **layer, "model_args": arguments}
    return merged


if __name__ == "__main__":
    parser = Parser(prog="python -m grkan.train.compare", description="Train several models alike.")
    add_training_options(parser)
    parser.add_argument("--config", metavar="FILE", help="settings in YAML, those of grkan train and runs")
    parser.add_argument("--models", nargs="+", metavar="MODEL", help="one run for each, in place of the file's runs")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.set_defaults(run=_main)
    sys.exit(run(parser))
