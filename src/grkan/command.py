"""What every command line here shares: a mistake gets one line on standard error, and no traceback."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

_EXTRAS = {
    "timm": "models",
    "safetensors": "models",
    "scipy": "fit",
    "numpy": "fit",
    "matplotlib": "plot",
    "tensorboard": "tensorboard",
}
"""The extra that brings a package; all others come with `train`."""


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake gets one line."""

    def error(self, message: str) -> NoReturn:
        """End the process with status 2."""
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def run(parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> int:
    """Parse arguments, call what the parser's default `run` names, and turn errors into one line.

    Args:
        parser: its `run` takes the parsed options, and may set `folder` in them: the folder of the run that it trains.
        arguments: without the program's name; None takes those of the process.

    Returns:
        The exit status: 0 if it did what was asked; 1 after one line on standard error; 130 after Ctrl-C.
    """
    options = parser.parse_args(arguments)
    try:
        options.run(options)
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        return _fail(f"interrupted{_resume_hint(getattr(options, 'folder', None))}", 130)
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


def _resume_hint(folder: str | None) -> str:
    started = folder is not None and (Path(folder) / "config.yaml").exists()
    return f"; go on with: grkan train --resume {folder}" if started else ""


def _fail(message: str, status: int = 1) -> int:
    rank = os.environ.get("RANK", "0")
    process = "" if rank == "0" else f" (process {rank})"
    print(f"grkan{process}: {message}", file=sys.stderr, flush=True)
    return status
