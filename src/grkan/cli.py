"""The command `grkan`. What a command needs is imported when it runs, so that `grkan --help` answers at once."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence

from ._version import __version__
from .command import Parser, run
from .errors import GrkanValueError
from .train.config import add_training_options, training_settings


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: without the program's name; None takes those of the process.

    Returns:
        The exit status: 0 if it did what was asked; 1 after one line on standard error; 130 after Ctrl-C.
        (argparse ends the process with 2 for arguments that it does not know.)
    """
    return run(_parser(), arguments)


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

    sub = command("convert", _convert, "turn a pretrained Vision Transformer into a KAT that computes the same")
    sub.add_argument("--model", metavar="NAME", help="a name of timm's registry (that of the checkpoint)")
    sub.add_argument("--checkpoint", metavar="FILE", help="its weights: a run's folder, a model file, or one of timm's")
    sub.add_argument("--data", help="training images to fit the functions to, as for train (none: from the weights)")
    sub.add_argument("--images", type=_positive, default=256, metavar="N", help="how many of them (256)")
    sub.add_argument("--order", nargs=2, type=int, default=[5, 4], metavar=("M", "N"), help="degrees of P and Q (5 4)")
    sub.add_argument("--num-groups", type=_positive, default=8, metavar="N", help="at most so many groups (8)")
    sub.add_argument("--form", default="abs_of_sum", help="abs_of_sum (default) or sum_of_abs")
    sub.add_argument("--output", required=True, metavar="FILE", help="the model file, for train --init and eval")
    sub.add_argument("--plot", metavar="FILE", help="save a picture of the worst fits")

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
    sub.add_argument("suite", choices=("ops", "layers", "models", "kernels"), metavar="ops|layers|models|kernels")
    sub.add_argument("--rounds", type=_positive, default=15, metavar="N", help="turns of each rival (15)")
    sub.add_argument("--threads", type=_positive, metavar="N", help="threads of PyTorch (its own choice)")
    sub.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cpu (default), or cuda, a GPU")
    sub.add_argument("--json", metavar="FILE", help="write all that was measured")
    return parser


def _train(options: argparse.Namespace) -> None:
    settings = training_settings(options)
    if options.output:
        settings["output"] = options.output
    if options.resume:
        if options.config:
            raise GrkanValueError("--config does not go with --resume: the run's own configuration is used")
        options.folder = options.resume
        from .train.loop import resume

        resume(options.resume, settings)
        return
    from .train.config import make_config, read_yaml

    config = make_config(read_yaml(options.config) if options.config else {}, settings)
    from .train.loop import resolve, train

    config = resolve(config)
    options.folder = config.output
    train(config)


def _eval(options: argparse.Namespace) -> None:
    import math

    from .train.data import UnreadableImages
    from .train.evaluate import load_trained, score, test_loader
    from .train.progress import evaluation_bar

    trained = load_trained(options.model)
    loader = test_loader(trained, options.data, options.batch_size, options.workers)
    unreadable = UnreadableImages()
    with evaluation_bar(len(loader)) as advance:
        result = score(trained.model, loader, trained.device, unreadable, advance)
    if not result.images:
        raise GrkanValueError(f"--data {options.data} has no readable image")
    if not math.isfinite(result.loss):
        raise GrkanValueError(
            f"the loss of {options.model} is {result.loss}: its weights or its outputs are not finite"
        )
    if unreadable.names:
        total = result.images + len(unreadable.names)
        print(f"{len(unreadable.names)} of {total} images were unreadable and left out", file=sys.stderr)
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
        raise GrkanValueError(failures[0] + more)


def _convert(options: argparse.Namespace) -> None:
    from .convert import convert_
    from .models.files import save_model
    from .train.evaluate import calibration_images, load_original
    from .writing import check_writable

    check_writable(options.output)
    _check_picture(options.plot)
    if not options.model and not options.checkpoint:
        raise GrkanValueError("give --model, --checkpoint or both: what is to be converted?")
    original = load_original(options.model, options.checkpoint, options.data)
    images = None
    if options.data:
        images = calibration_images(original, options.data, options.images)
    report = convert_(
        original.model,
        calibration=images,
        num_groups=options.num_groups,
        order=tuple(options.order),
        form=options.form,
    )
    print(report)
    save_model(original.model, options.output, classes=original.classes or None, preprocessing=original.preprocessing)
    if options.plot:
        from .plot import plot_conversion, save_figure
        from .writing import replacing

        figure = plot_conversion(report)
        with replacing(options.plot) as path:
            save_figure(figure, path)
        print(options.plot)
    print(options.output)


def _plot(options: argparse.Namespace) -> None:
    from .plot import plot_functions, record_inputs, save_figure
    from .train.data import UnreadableImages
    from .train.evaluate import first_images, load_trained, load_weights, test_loader
    from .writing import replacing

    _check_picture(options.output)
    inputs = None
    if options.data:
        trained = load_trained(options.model)
        model = trained.model
        images = first_images(test_loader(trained, options.data, batch_size=256, workers=0), UnreadableImages())
        if images is not None:
            inputs = record_inputs(model, [images.to(trained.device)])
    else:
        model = load_weights(options.model)
    figure = plot_functions(model, inputs)
    with replacing(options.output) as path:
        save_figure(figure, path)
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

    _check_picture(options.output)
    interval = tuple(options.interval) if options.interval else None
    result = fit(options.name, tuple(options.order), form=options.form, interval=interval)
    print(result)
    if options.output:
        import torch

        from .plot import plot_fit, save_figure
        from .rational.table import exact
        from .writing import replacing

        target = exact(options.name)
        figure = plot_fit(result, lambda x: target(torch.from_numpy(x)).numpy(), result.interval, options.name)
        with replacing(options.output) as path:
            save_figure(figure, path)
        print(options.output)


def _bench(options: argparse.Namespace) -> None:
    from .bench import bench, bench_kernels

    if options.suite == "kernels":
        bench_kernels(options.json)
        return
    bench(options.suite, options.rounds, options.threads, options.json, options.device)


def _check_picture(path: str | None) -> None:
    """A picture's place and format, before the work."""
    if path is not None:
        from .plot import check_picture
        from .writing import check_writable

        check_writable(path)
        check_picture(path)


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number, at least 1; got {text}")
    return value


if __name__ == "__main__":
    sys.exit(main())
