"""Experiment trackers that Accelerate supports: TensorBoard, Weights & Biases, MLflow and others."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from ..errors import GrkanImportError, GrkanValueError
from .config import Config, nearest, to_dict

_PROJECT = "grkan"


def check_trackers(names: str | None) -> list[str]:
    """Return the trackers that a setting names.

    Raises:
        ValueError: there is no such tracker.
        ImportError: its package is missing.
    """
    trackers = [name.strip() for name in (names or "").split(",") if name.strip()]
    at_hand = {str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers()}
    for name in trackers:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise GrkanValueError(f"unknown tracker {name!r}; {nearest(name, sorted(LOGGER_TYPE_TO_CLASS))}")
    for name in trackers:
        if name not in at_hand:
            raise GrkanImportError(f"the tracker {name} needs its package; install it with: pip install {name}")
    return trackers


class Trackers:
    """The trackers of a run, from its start to its end.

    Args:
        accelerator: an accelerator made with `log_with`.
        config: the configuration of the run.
        folder: the folder of the run.
        step: the step that the run starts with.
    """

    def __init__(self, accelerator: Accelerator, config: Config, folder: Path, step: int) -> None:
        self._accelerator = accelerator
        arguments = {
            "tensorboard": {"purge_step": step},  # later steps are from an interrupted run
            "wandb": {"dir": str(folder), "name": folder.name},
        }
        accelerator.init_trackers(_PROJECT, init_kwargs=arguments)
        settings = {key: _plain(value) for key, value in to_dict(config).items()}
        for tracker in accelerator.trackers:
            if tracker.name != "tensorboard":  # it would make a separate run of them
                tracker.store_init_configuration(settings)

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Send numbers to all trackers."""
        self._accelerator.log(dict(values), step=step)

    def close(self) -> None:
        """Let the trackers write their data."""
        for tracker in self._accelerator.trackers:
            tracker.finish()


def _plain(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, (list, dict)) else value
