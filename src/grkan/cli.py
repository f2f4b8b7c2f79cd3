"""The command `grkan`. Each command imports what it needs when it runs, so that `grkan --help` answers at once."""

import argparse
import csv
import io
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from ._version import __version__
from .errors import GrkanError, GrkanValueError
from .train.config import add_training_options, make_config, merge, read_yaml
from .train.interruption import SIGTERM_STATUS, TrainingStopped

_PACKAGES = {"PIL": "pillow", "sklearn": "scikit-learn", "yaml": "pyyaml"}
"""Packages whose name differs from that of their module."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    A mistake of the user prints one line on standard error. Any other error is a bug, and is not caught.

    Args:
        arguments: the arguments without the program's name; None: those of the process.

    Returns:
        The exit status: 0 for success; 1 after one line on standard error; 130 after Ctrl-C; 143 after SIGTERM, on
        which `train` and `compare` save their state.
        (argparse ends the process with 2 for arguments that it does not understand.)
    """
    _prepare_streams()
    options = argparse.Namespace()
    try:
        _parser().parse_args(arguments, options)
        options.run(options)
        sys.stdout.flush()
        return 0
    except TrainingStopped as stop:
        return _fail(f"{stop}{_way_on(options)}", SIGTERM_STATUS) if _is_main_process() else SIGTERM_STATUS
    except KeyboardInterrupt:
        return _fail(f"interrupted{_way_on(options)}", 130)
    except GrkanError as error:
        return _fail(str(error))
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module in ("", "grkan") or module in sys.stdlib_module_names:
            raise
        package = _PACKAGES.get(module, module)
        return _fail(f"{package} is missing; install it with: pip install {package}")
    except MemoryError as error:
        return _fail(f"there is not enough memory{f': {error}' if str(error) else ''}")
    except torch.OutOfMemoryError:
        return _fail("the GPU ran out of memory; lower --batch-size, or raise --accumulate")
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        return _fail("a process that loads images was killed, perhaps because memory ran out; try fewer --workers")
    except BrokenPipeError:  # the reader of the output, such as `head`, has had enough
        _give_up_output()
        way_on = _way_on(options)
        return _fail(f"the reader of the output has closed it{way_on}") if way_on else 1
    except OSError as error:
        where = error.filename
        try:
            sys.stdout.flush()
        except OSError:
            _give_up_output()
            where = where or "standard output"
        return _fail(f"{where}: {error.strerror or error}" if where else error.strerror or str(error))


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser that reports a mistake on one line."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        # As in Python 3.14: -1e-3 is a number, too, not an option.
        self._negative_number_matcher = re.compile(r"-\.?\d|-inf$")

    def error(self, message: str) -> NoReturn:
        """End the process with status 2."""
        self.exit(2, f"{self.prog}: {' '.join(message.split())}; see {self.prog} --help\n")


def _prepare_streams() -> None:
    """Keep printing from raising, to a closed stream or with a character that the encoding lacks."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  for as long as the process lives
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _give_up_output() -> None:
    """Keep Python from trying again, at exit, to write the output that failed."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _way_on(options: argparse.Namespace) -> str:
    """Return the end of a message that says how to go on with a run that has begun."""
    written, command = getattr(options, "way_on", (None, ""))
    return f"; go on with: {command}" if written is not None and Path(written).exists() else ""


def _fail(message: str, status: int = 1) -> int:
    process = "" if _is_main_process() else f" (process {os.environ['RANK']})"
    print(f"grkan{process}: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return status


def _is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="grkan", description="Kolmogorov-Arnold Transformers: train them, use them, look at them.")
    parser.add_argument("--version", action="version", version=f"grkan {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        sub.set_defaults(run=run)
        return sub

    sub = command("train", _train, "train a model on labelled images")
    sub.add_argument("--config", type=_name, metavar="FILE", help="settings as YAML; the command line overrides them")
    sub.add_argument("--resume", type=_name, metavar="DIR", help="continue the interrupted run in this folder")
    sub.add_argument(
        "--auto-resume",
        action="store_true",
        help="continue the run if its folder holds one, otherwise start it",
    )
    add_training_options(sub)

    sub = command("eval", _eval, "test a trained model; the last line is JSON")
    sub.add_argument("model", type=_name, metavar="DIR|FILE", help="a run's folder or a model file")
    sub.add_argument(
        "--data",
        type=_name,
        required=True,
        help="as for train; a folder may also hold the folders of the classes directly",
    )
    sub.add_argument(
        "--confusion",
        type=_name,
        action="append",
        default=[],
        metavar="FILE",
        help="write the confusion matrix as JSON (.json) or as a picture; give it twice for both",
    )
    sub.add_argument(
        "--split", type=_name, metavar="NAME", help="train, val or another (the one that runs are tested on)"
    )
    sub.add_argument(
        "--val-split", type=float, metavar="X", help="as for train (by default that of the run, for the same data)"
    )
    sub.add_argument("--seed", type=_not_negative, default=0, metavar="N", help="seed for --val-split (%(default)s)")
    sub.add_argument("--batch-size", type=_positive, default=128, metavar="N", help="images at a time (%(default)s)")
    sub.add_argument("--workers", type=_not_negative, metavar="N", help="processes that load images")

    sub = command("predict", _predict, "classify images; print a line for each, with the error if it cannot be read")
    sub.add_argument("model", type=_name, metavar="DIR|FILE", help="a run's folder or a model file")
    sub.add_argument(
        "images",
        type=_name,
        nargs="+",
        metavar="IMAGE|FOLDER",
        help="image files, or folders, which are searched for images",
    )
    sub.add_argument(
        "--top",
        type=_positive,
        default=5,
        metavar="N",
        help="the number of classes to print for each image (%(default)s)",
    )
    sub.add_argument("--format", choices=("jsonl", "csv"), default="jsonl", help="JSON lines (default) or CSV")
    sub.add_argument("--batch-size", type=_positive, default=32, metavar="N", help="images at a time (%(default)s)")
    sub.add_argument(
        "--workers",
        type=_not_negative,
        metavar="N",
        help="processes that load images (depends on the number of images)",
    )

    sub = command("compare", _compare, "train several models, or variants of one, and compare them")
    sub.add_argument("--config", type=_name, metavar="FILE", help="settings as YAML: those of train, and `runs`")
    sub.add_argument(
        "--models", nargs="+", metavar="NAME", help="one run for each model, instead of the runs in the file"
    )
    sub.add_argument("--output", type=_name, required=True, metavar="DIR", help="the folder for all runs")
    sub.add_argument(
        "--jobs", type=_positive, default=1, metavar="N", help="runs at a time, which share the threads (%(default)s)"
    )
    add_training_options(sub, without=("model", "output"))

    sub = command("convert", _convert, "turn a pretrained Vision Transformer into a KAT that computes the same")
    sub.add_argument("--model", metavar="NAME", help="a name in timm's registry (by default that of the checkpoint)")
    sub.add_argument(
        "--start",
        default="pretrained",
        help="pretrained: keep the weights (default); scratch: draw random ones, for a KAT to train",
    )
    sub.add_argument(
        "--checkpoint",
        type=_name,
        metavar="FILE",
        help="its weights: a run's folder, a model file, or a checkpoint of timm",
    )
    sub.add_argument(
        "--data",
        type=_name,
        help="training images to fit the functions to, as for train (by default, the weights predict the inputs)",
    )
    sub.add_argument(
        "--images", type=_positive, default=256, metavar="N", help="the number of training images to use (%(default)s)"
    )
    sub.add_argument(
        "--num-groups", type=_positive, default=8, metavar="N", help="the largest number of groups (%(default)s)"
    )
    _add_function_options(sub)
    sub.add_argument(
        "--output", type=_name, required=True, metavar="FILE", help="the model file, for train --init and eval"
    )
    sub.add_argument("--plot", type=_name, metavar="FILE", help="save a picture of the worst fits")

    sub = command("export", _export, "write a model for programs without grkan: ONNX, OpenVINO, PyTorch's packages")
    sub.add_argument("model", type=_name, metavar="DIR|FILE", help="a run's folder or a model file")
    sub.add_argument(
        "--output", type=_name, required=True, metavar="FILE", help="the file to write; for timm, a folder"
    )
    sub.add_argument("--format", default="onnx", help="onnx (default), openvino, pt2, aoti, executorch or timm")
    sub.add_argument(
        "--with-library", action="store_true", help="for onnx: put grkan's kernel for ONNX Runtime beside the file"
    )
    sub.add_argument("--int8", action="store_true", help="for onnx: weights in 8 bits")

    sub = command("plot", _plot, "plot each learned function of a model with its initial function, or make a web page")
    sub.add_argument("model", type=_name, metavar="DIR|FILE", help="a run's folder or a model file")
    sub.add_argument(
        "--data",
        type=_name,
        help="show a histogram of each function's inputs on test images of "
        "this data set (a page: by default the run's)",
    )
    sub.add_argument(
        "--output",
        type=_name,
        required=True,
        metavar="FILE",
        help="a .png, .svg or .pdf file; or .html, a page with the functions, the curves and the confusion matrix",
    )

    sub = command("info", _info, "count a model's parameters and operations, and those of its Vision Transformer")
    sub.add_argument("model", type=_name, help="a name in timm's registry, a run's folder or a model file")

    sub = command("fit", _fit, "fit a rational function to a named function")
    sub.add_argument("name", help="gelu, silu, relu, tanh, ...")
    sub.add_argument(
        "--interval", nargs=2, type=float, metavar=("LOW", "HIGH"), help="the interval of the fit (that of the table)"
    )
    _add_function_options(sub)
    sub.add_argument("--output", type=_name, metavar="FILE", help="save a picture of target, fit and error")

    sub = command("bench", _bench, "time the function, the layer or the model against its rivals, which take turns")
    sub.add_argument(
        "suite", choices=("ops", "layers", "models", "deploy", "kernels"), metavar="ops|layers|models|deploy|kernels"
    )
    sub.add_argument("--rounds", type=_positive, metavar="N", help="the number of turns of each rival (15)")
    sub.add_argument(
        "--threads", type=_positive, metavar="N", help="the number of PyTorch's threads (PyTorch's default)"
    )
    sub.add_argument("--device", choices=("cpu", "cuda"), help="cpu (default), or cuda, a GPU")
    sub.add_argument("--json", metavar="FILE", help="write all measurements")
    return parser


def _add_function_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--order", nargs=2, type=int, default=(5, 4), metavar=("M", "N"), help="degrees of P and Q (5 4)"
    )
    parser.add_argument("--form", default="abs_of_sum", help="abs_of_sum (default) or sum_of_abs")


def _name(text: str) -> str:
    """Refuse an empty name: it comes from an unset shell variable and is never intended."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def _positive(text: str) -> int:
    return _whole(text, 1)


def _not_negative(text: str) -> int:
    return _whole(text, 0)


def _whole(text: str, low: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = low - 1
    if value < low:
        raise argparse.ArgumentTypeError(f"must be a whole number, at least {low}; got {text}")
    return value


def _train(options: argparse.Namespace) -> None:
    if options.resume is not None:
        if options.config is not None:
            raise GrkanValueError("--config cannot be used with --resume, which uses the configuration of the run")
        if options.auto_resume:
            raise GrkanValueError(
                "--auto-resume cannot be used with --resume; give it to the command that starts the run"
            )
        from .train.loop import resume

        _set_way_on(options, options.resume)
        resume(options.resume, merge(*options.settings))
        return
    config = make_config({} if options.config is None else read_yaml(options.config), *options.settings)
    from .train.loop import resolve, train

    config = resolve(config)
    _set_way_on(options, config.output or "")
    train(config, options.auto_resume)


def _set_way_on(options: argparse.Namespace, folder: str) -> None:
    command = "the same command" if options.auto_resume else f"grkan train --resume {shlex.quote(folder)}"
    options.way_on = (Path(folder) / "config.yaml", command)


def _eval(options: argparse.Namespace) -> None:
    import math

    from .train.data import describe, find_source
    from .train.evaluate import Details, data_for, loader_for, score
    from .train.loading import UnreadableImages
    from .train.model import load_trained
    from .train.progress import evaluation_bar

    trained = load_trained(options.model)
    for path in options.confusion:
        _check_matrix(path)
    given = make_config({"data": options.data, "val_split": options.val_split, "seed": options.seed})  # checks them
    images = data_for(trained, given.data, options.split, given.val_split, given.seed)
    workers = find_source(options.data).workers if options.workers is None else options.workers
    loader = loader_for(trained, images, options.batch_size, workers)
    if images.where is not None:
        print(describe(images))
    unreadable = UnreadableImages()
    details = Details(len(trained.classes), confusion=bool(options.confusion))
    with evaluation_bar(len(loader)) as advance:
        result = score(trained.model, loader, trained.device, unreadable, advance, details)
    if not result.images:
        raise GrkanValueError(f"--data {options.data} has no readable image")
    if not math.isfinite(result.loss):
        raise GrkanValueError(
            f"the loss of {options.model} is {result.loss}: its weights or its outputs are not finite"
        )
    if unreadable.names:
        total = result.images + len(unreadable.names)
        print(f"{len(unreadable.names)} of {total} images were unreadable and left out", file=sys.stderr)
    for path in options.confusion:
        _write_matrix(path, details.confusion, trained.classes)
    about_classes = details.to_dict(trained.classes)
    print(json.dumps({"top1": result.to_dict()["top1"], **about_classes, **result.to_dict()}))


def _check_matrix(path: str) -> None:
    from .writing import check_writable

    if path.lower().endswith(".json"):
        check_writable(path)
    else:
        _check_picture(path)


def _write_matrix(path: str, matrix: Any, classes: Sequence[str]) -> None:
    from .plot import plot_confusion, save_figure
    from .writing import replacing, write_bytes

    if path.lower().endswith(".json"):
        write_bytes(path, json.dumps({"classes": list(classes), "matrix": matrix.tolist()}).encode())
    else:
        figure = plot_confusion(matrix.numpy(), classes)
        with replacing(path) as temporary:
            save_figure(figure, temporary)
    print(path)


def _predict(options: argparse.Namespace) -> None:
    from .train.data import tell_passed_over
    from .train.evaluate import find_images, predict
    from .train.model import load_trained

    files, passed_over = find_images(options.images)
    trained = load_trained(options.model)
    workers = options.workers
    if workers is None:  # processes of their own take seconds to start
        workers = 0 if len(files) <= 4 * options.batch_size else min(8, os.cpu_count() or 1)
    utf8 = (sys.stdout.encoding or "").lower() in ("utf-8", "utf8")
    top = min(options.top, len(trained.classes))
    if options.format == "csv":
        numbered = [f"{column}_{i}" for i in range(2, top + 1) for column in ("label", "probability")]
        table = csv.writer(sys.stdout, lineterminator="\n")
        table.writerow(["path", "error", "label", "probability", *numbered])
    failures = 0
    for result in predict(trained, files, options.batch_size, workers, options.top):
        failures += "error" in result
        if options.format == "csv":
            best = result.get(f"top{options.top}", [])
            table.writerow([result["path"], result.get("error", ""), *(value for pair in best for value in pair)])
            sys.stdout.flush()
        else:
            print(json.dumps(result, ensure_ascii=not utf8), flush=True)
    if failures or passed_over:
        what = f"{failures} of {len(files)} images could not be read" if failures else f"{len(files)} images"
        message = f"{what}{tell_passed_over(passed_over)}"
        if failures:
            raise GrkanValueError(message)
        print(message, file=sys.stderr)


def _compare(options: argparse.Namespace) -> None:
    from .train.compare import compare, comparison_table, make_runs
    from .train.progress import make_console

    content = {} if options.config is None else read_yaml(options.config)
    runs = make_runs(content, options.models, merge(*options.settings))
    options.way_on = (options.output, "the same command")
    summaries = compare(runs, options.output, options.jobs)
    output = Path(options.output)
    console = make_console()
    console.print(comparison_table(output))
    pictures = sorted(output.glob("*.png"))
    if options.jobs == 1:
        pictures += [path for name in summaries for path in sorted((output / name).glob("*.png"))]
    for path in [output / "comparison.json", output / "comparison.md", *pictures]:
        console.print(str(path), soft_wrap=True)


def _convert(options: argparse.Namespace) -> None:
    from .convert import convert_
    from .models.files import save_model
    from .rational.arguments import check_choice
    from .train.loading import calibration_images
    from .train.model import load_original
    from .writing import check_writable

    pretrained = check_choice("--start", options.start, ("pretrained", "scratch")) == "pretrained"
    if options.plot is not None and not pretrained:
        raise GrkanValueError("--plot shows fitted functions; --start scratch fits none")
    check_writable(options.output)
    _check_picture(options.plot)
    original = load_original(options.model, options.checkpoint, options.data, pretrained)
    images = None
    if options.data is not None:
        batches = calibration_images(options.data, original.preprocessing, options.images)
        images = (batch.to(original.device) for batch in batches)
    report = convert_(
        original.model,
        start=options.start,
        calibration=images,
        num_groups=options.num_groups,
        order=tuple(options.order),
        form=options.form,
    )
    print(report)
    save_model(original.model, options.output, classes=original.classes or None, preprocessing=original.preprocessing)
    if options.plot is not None:
        from .plot import plot_conversion, save_figure
        from .writing import replacing

        figure = plot_conversion(report)
        with replacing(options.plot) as path:
            save_figure(figure, path)
        print(options.plot)
    print(options.output)


def _export(options: argparse.Namespace) -> None:
    from .export import FORMATS, export
    from .rational.arguments import check_choice
    from .train.model import load_weights
    from .train.start import model_file
    from .writing import write_bytes

    check_choice("--format", options.format, FORMATS)
    output, library = Path(options.output), None
    if output.resolve() == model_file(options.model).resolve():
        raise GrkanValueError(f"--output must not be the model itself; got {options.output}")
    if options.with_library:
        if options.format != "onnx":
            raise GrkanValueError(f"--with-library is for --format onnx, not {options.format}")
        from . import onnx_library

        library = Path(onnx_library())
        if output.name == library.name:
            raise GrkanValueError(f"--output must not have the name of the library beside it; got {options.output}")
    written = [export(load_weights(options.model), output, format=options.format, int8=options.int8)]
    if library is not None:
        written.append(written[0].with_name(library.name))
        write_bytes(written[1], library.read_bytes())
    for path in written:
        print(path)


def _plot(options: argparse.Namespace) -> None:
    if Path(options.output).suffix.lower() in (".html", ".htm"):
        _report(options)
        return
    from .plot import plot_functions, record_inputs, save_figure
    from .train.evaluate import data_for, first_images, loader_for
    from .train.loading import UnreadableImages
    from .train.model import load_trained, load_weights
    from .writing import replacing

    _check_picture(options.output)
    inputs = None
    if options.data is not None:
        trained = load_trained(options.model)
        model = trained.model
        loader = loader_for(trained, data_for(trained, options.data), batch_size=256, workers=0)
        images = first_images(loader, UnreadableImages())
        if images is not None:
            inputs = record_inputs(model, [images.to(trained.device)])
    else:
        model = load_weights(options.model)
    figure = plot_functions(model, inputs)
    with replacing(options.output) as path:
        save_figure(figure, path)
    print(options.output)


def _report(options: argparse.Namespace) -> None:
    """Run `grkan plot` for a page: the content of the picture, and everything else known about a run."""
    from .inspection import rationals, record_inputs
    from .report import make_report
    from .train.evaluate import Details, data_for, first_images, loader_for, score
    from .train.loading import UnreadableImages
    from .train.metrics import read_metrics
    from .train.model import load_trained, load_weights
    from .train.progress import evaluation_bar
    from .writing import check_writable, write_bytes

    check_writable(options.output)
    model = load_weights(options.model)
    rationals(model)  # raises before the work if there are none
    run = Path(options.model)
    title, data = run.resolve().name, options.data
    found: dict[str, Any] = {}
    if (run / "metrics.jsonl").is_file():
        found["metrics"] = read_metrics(run / "metrics.jsonl")
    if (run / "config.yaml").is_file():
        config = read_yaml(run / "config.yaml")
        title = f"{title}: {config.get('model')} on {Path(str(config.get('data'))).name}"
        data = data or config.get("data")
    if data is None:
        found["notes"] = ["The inputs of the functions are not known: give --data to see their histograms."]
    else:
        try:
            trained = load_trained(options.model)
            loader = loader_for(trained, data_for(trained, data), batch_size=256, workers=0)
        except GrkanValueError as error:
            if options.data is not None:
                raise
            found["notes"] = [f"The inputs of the functions are not known: {error}."]
        else:
            unreadable = UnreadableImages()
            images = first_images(loader, unreadable)
            if images is not None:
                found["inputs"] = record_inputs(trained.model, [images.to(trained.device)])
            details = Details(len(trained.classes), confusion=True)
            with evaluation_bar(len(loader)) as advance:
                score(trained.model, loader, trained.device, unreadable, advance, details)
            confusion: Any = details.confusion
            found["confusion"] = confusion.tolist()
            found["classes"] = trained.classes
    write_bytes(options.output, make_report(model, title=title, **found).encode())
    print(options.output)


def _info(options: argparse.Namespace) -> None:
    from rich.table import Table

    from .train.model import describe
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

    _check_picture(options.output)
    interval = None if options.interval is None else tuple(options.interval)
    result = fit(options.name, tuple(options.order), form=options.form, interval=interval)
    print(result)
    if options.output is not None:
        from .plot import plot_fit, save_figure
        from .rational.table import exact
        from .writing import replacing

        target = exact(options.name)
        figure = plot_fit(result, lambda x: target(torch.from_numpy(x)).numpy(), result.interval, options.name)
        with replacing(options.output) as path:
            save_figure(figure, path)
        print(options.output)


def _bench(options: argparse.Namespace) -> None:
    settings = {name: getattr(options, name) for name in ("rounds", "threads", "device")}
    given = {name: value for name, value in settings.items() if value is not None}
    if options.suite == "kernels" and given:
        raise GrkanValueError(f"--{next(iter(given))} cannot be used with kernels, which are compiled but not timed")
    from .bench import run_kernels, run_suite

    if options.suite == "kernels":
        run_kernels(path=options.json)
    else:
        run_suite(options.suite, path=options.json, **given)


def _check_picture(path: str | None) -> None:
    """Check the path and format of a picture before the work starts."""
    if path is not None:
        from .plot import check_picture
        from .writing import check_writable

        check_writable(path)
        check_picture(path)


if __name__ == "__main__":
    sys.exit(main())
