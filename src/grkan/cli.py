"""The command `grkan`. What a command needs is imported when it runs, so that `grkan --help` answers at once."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from ._version import __version__

_EXTRAS = {
    "timm": "models",
    "safetensors": "models",
    "scipy": "fit",
    "numpy": "fit",
    "matplotlib": "plot",
    "tensorboard": "tensorboard",
}
"""The extra that brings a package; all others come with `train`."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: without the program's name; None takes those of the process.

    Returns:
        The exit status: 0 if it did what was asked; 1 after one line on standard error; 130 after Ctrl-C.
        (argparse ends the process with 2 for arguments that it does not know.)
    """
    return run(_parser(), arguments)


def run(parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> int:
    """Parse arguments, call what the parser's default `run` names, and turn errors into one line; as `main`."""
    options = parser.parse_args(arguments)
    try:
        options.run(options)
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        hint = f"; go on with: grkan train --resume {options.folder}" if getattr(options, "folder", None) else ""
        return _fail(f"interrupted{hint}", 130)
    except BrokenPipeError:  # the reader, such as `head`, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        return _fail(f'{package} is missing; install it with: pip install "grkan[{_EXTRAS.get(package, "train")}]"')
    except (ValueError, TypeError, RuntimeError, OSError, ImportError) as error:
        if os.environ.get("GRKAN_DEBUG"):
            raise
        if isinstance(error, OSError) and error.strerror:
            where = f"{error.filename}: " if error.filename else ""
            return _fail(f"{where}{error.strerror}")
        return _fail(" ".join(str(error).split()) or type(error).__name__)


def _fail(message: str, status: int = 1) -> int:
    rank = os.environ.get("RANK", "0")
    process = "" if rank == "0" else f" (process {rank})"
    print(f"grkan{process}: {message}", file=sys.stderr, flush=True)
    return status


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake gets one line."""

    def error(self, message: str) -> NoReturn:
        """End the process with status 2."""
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="grkan",
        description="Kolmogorov-Arnold Transformers: train them, use them, look at them.",
        epilog="GRKAN_DEBUG=1 in the environment shows where an error comes from.",
    )
    parser.add_argument("--version", action="version", version=f"grkan {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        sub.set_defaults(run=run)
        return sub

    sub = command("train", _train, "train a model on labelled images")
    add_training_options(sub)
    sub.add_argument("--model", help="a name of timm's registry, such as kat_micro_patch2_8")
    sub.add_argument("--config", metavar="FILE", help="settings in YAML; the command line overrides them")
    sub.add_argument("--output", metavar="DIR", help="the run's folder (runs/MODEL-DATA)")
    sub.add_argument("--resume", metavar="DIR", help="go on with the interrupted run in this folder")

    sub = command("eval", _eval, "test a trained model; the last line is JSON")
    sub.add_argument("model", metavar="DIR|FILE", help="a run's folder or a model file")
    sub.add_argument("--data", required=True, help="as for train; a folder may hold the classes' folders itself")
    sub.add_argument("--batch-size", type=_positive, default=128, metavar="N")
    sub.add_argument("--workers", type=int, metavar="N", help="processes that load images")

    sub = command("predict", _predict, "classify images; one JSON line for each")
    sub.add_argument("model", metavar="DIR|FILE", help="a run's folder or a model file")
    sub.add_argument("images", nargs="+", metavar="IMAGE")

    sub = command("plot", _plot, "draw the learned functions of a model, each against its initial one")
    sub.add_argument("model", metavar="DIR|FILE", help="a run's folder or a model file")
    sub.add_argument("--data", help="show the histogram of each function's inputs for test images of this data set")
    sub.add_argument("--output", required=True, metavar="FILE", help="a .png, .svg or .pdf file")

    sub = command("info", _info, "count a model's parameters and operations, next to its Vision Transformer's")
    sub.add_argument("model", metavar="MODEL", help="a name of timm's registry, a run's folder or a model file")

    sub = command("fit", _fit, "fit a rational function to a named function")
    sub.add_argument("name", help="gelu, silu, relu, tanh, ...")
    sub.add_argument("--interval", nargs=2, type=float, metavar=("LOW", "HIGH"), help="where (the table's interval)")
    sub.add_argument("--order", nargs=2, type=int, default=[5, 4], metavar=("M", "N"), help="degrees of P and Q (5 4)")
    sub.add_argument("--form", default="abs_of_sum", help="abs_of_sum (default) or sum_of_abs")
    sub.add_argument("--output", metavar="FILE", help="save a picture of target, fit and error")

    sub = command("bench", _bench, "time the function, the layer or the model against its rivals, in turn in one run")
    sub.add_argument("suite", choices=("ops", "layers", "models"), metavar="ops|layers|models")
    sub.add_argument("--rounds", type=_positive, default=15, metavar="N", help="turns of each rival (15)")
    sub.add_argument("--threads", type=_positive, metavar="N", help="threads of PyTorch (its own choice)")
    sub.add_argument("--json", metavar="FILE", help="write all that was measured")
    return parser


def add_training_options(parser: argparse.ArgumentParser) -> None:
    """The settings that have an option of their own; `--set` reaches every other."""
    parser.add_argument("--data", help="digits, fashion-mnist, fashion-mnist:FOLDER, or a folder with train/ and val/")
    parser.add_argument("--epochs", type=int, metavar="N")
    parser.add_argument("--batch-size", type=int, metavar="N", help="images per optimiser step, over all processes")
    parser.add_argument("--lr", type=float, metavar="X", help="the highest learning rate")
    parser.add_argument("--seed", type=int, metavar="N")
    parser.add_argument("--init", metavar="FILE", help="a model file or a run's folder to start from")
    parser.add_argument("--trainable", help="all, or coefficients: the rational functions' alone")
    parser.add_argument("--workers", type=int, metavar="N", help="processes that load images")
    parser.add_argument(
        "--set",
        dest="assignments",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="any setting, such as mixup=0.8 or model_args.num_groups=4; config.yaml of a run lists them all",
    )


def training_settings(options: argparse.Namespace) -> dict[str, Any]:
    """The settings that were given on the command line."""
    from .train.config import parse_assignments

    names = ("data", "model", "epochs", "batch_size", "lr", "seed", "init", "trainable", "workers")
    given = {name: getattr(options, name, None) for name in names}
    settings = parse_assignments(options.assignments)
    return {**settings, **{name: value for name, value in given.items() if value is not None}}


def _train(options: argparse.Namespace) -> None:
    settings = training_settings(options)
    if options.output:
        settings["output"] = options.output
    if options.resume:
        if options.config:
            raise ValueError("--config does not go with --resume: the run's own configuration is used")
        options.folder = options.resume
        from .train.loop import resume

        resume(options.resume, settings)
        return
    from .train.config import make_config, read_yaml

    config = make_config(read_yaml(options.config) if options.config else {}, settings)
    from .train.loop import train

    options.folder = config.output
    train(config)


def _eval(options: argparse.Namespace) -> None:
    from .train.data import UnreadableImages
    from .train.evaluate import load_trained, score, test_loader
    from .train.progress import evaluation_bar

    trained = load_trained(options.model)
    loader = test_loader(trained, options.data, options.batch_size, options.workers)
    with evaluation_bar(len(loader)) as advance:
        result = score(trained.model, loader, trained.device, UnreadableImages(), advance)
    if not result.images:
        raise ValueError(f"--data {options.data} has no readable image")
    print(json.dumps(result.to_dict()))


def _predict(options: argparse.Namespace) -> None:
    from .train.evaluate import load_trained, predict

    trained = load_trained(options.model)
    failures = []
    for path in options.images:
        try:
            print(json.dumps(predict(trained, path), ensure_ascii=False), flush=True)
        except ValueError as error:
            failures.append(str(error))
    if failures:
        more = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
        raise ValueError(failures[0] + more)


def _plot(options: argparse.Namespace) -> None:
    from .plot import plot_functions, record_inputs, save_figure
    from .train.checkpoint import write_file
    from .train.evaluate import load_trained, load_weights, test_loader

    if options.data:
        trained = load_trained(options.model)
        model = trained.model
        batch = next(iter(test_loader(trained, options.data, batch_size=256, workers=0)))
        inputs = record_inputs(model, [batch.images.to(trained.device)])
    else:
        model, inputs = load_weights(options.model), None
    figure = plot_functions(model, inputs)
    write_file(options.output, lambda path: save_figure(figure, path))
    print(options.output)


def _info(options: argparse.Namespace) -> None:
    from rich.table import Table

    from .train.evaluate import describe
    from .train.progress import make_console

    rows = describe(options.model)
    table = Table()
    table.add_column("model")
    for column in ("parameters", "operations as the paper counts", "multiply-adds"):
        table.add_column(column, justify="right")
    for name, counts in rows.items():
        table.add_row(name, *(f"{counts[key]:,}" for key in ("parameters", "paper_operations", "multiply_adds")))
    make_console().print(table)


def _fit(options: argparse.Namespace) -> None:
    from .rational.fit import fit

    interval = tuple(options.interval) if options.interval else None
    result = fit(options.name, tuple(options.order), form=options.form, interval=interval)
    print(result)
    if options.output:
        import torch

        from .plot import plot_fit, save_figure
        from .rational.table import exact
        from .train.checkpoint import write_file

        target = exact(options.name)
        figure = plot_fit(result, lambda x: target(torch.from_numpy(x)).numpy(), result.interval, options.name)
        write_file(options.output, lambda path: save_figure(figure, path))
        print(options.output)


def _bench(options: argparse.Namespace) -> None:
    from .bench import bench

    bench(options.suite, options.rounds, options.threads, options.json)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; got {text}")
    return value


if __name__ == "__main__":
    sys.exit(main())
