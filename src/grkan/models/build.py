"""Build models of timm's registry from arguments that may be wrong."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch
from torch import nn

from ..errors import GrkanTypeError, GrkanValueError


class WrongArgumentsError(GrkanValueError):
    """Arguments that do not fit a model of timm's registry. The message gives only the reason."""


def build_model(name: str, arguments: Mapping[str, Any], right: Mapping[str, Any] | None = None) -> nn.Module:
    """Call `timm.create_model` on the CPU, whatever the default device is.

    Libraries have no error type of their own for a wrong argument: `num_heads=0` gives a ZeroDivisionError. So the
    arguments count as wrong if the model cannot be built with them on the meta device, where neither memory nor kernels
    can fail, but can be built there with the right ones. Any other error comes from a bug or from the machine, and is
    raised as it is.

    Args:
        name: a name in timm's registry.
        arguments: the keyword arguments.
        right: keyword arguments that are known to be right; None: the model's defaults.

    Raises:
        WrongArgumentsError: the arguments do not fit the model.
        ImportError: the arguments need a package that is missing.
    """
    try:
        return _create(name, arguments, "cpu")
    except ImportError:
        raise
    except Exception as error:
        if _can_be_laid_out(name, arguments) or not _can_be_laid_out(name, right or {}):
            raise
        kind = "" if isinstance(error, (GrkanTypeError, GrkanValueError)) else f"{type(error).__name__}: "
        raise WrongArgumentsError(kind + " ".join(str(error).split())) from error


def _can_be_laid_out(name: str, arguments: Mapping[str, Any]) -> bool:
    try:
        _create(name, arguments, "meta")
    except Exception:
        return False
    return True


def _create(name: str, arguments: Mapping[str, Any], device: str) -> nn.Module:
    with torch.device(device):
        return import_module("timm").create_model(name, **arguments)
