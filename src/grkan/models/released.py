"""Read the checkpoints that the paper's authors released into a KAT, and write them from one.

Their keys are those of timm's VisionTransformer, plus mlp.act1 and mlp.act2 with weight_numerator (1, 6) and
weight_denominator (8, 4). The authors' kernels compute the form sum_of_abs. `GroupRational` itself accepts these names;
this module finds out which model a file is for.
"""

import io
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import GrkanImportError, GrkanTypeError, GrkanValueError
from ..nn import GroupRational
from ..rational.arguments import check_flag, check_module
from ..writing import write_bytes

try:
    from timm.models import clean_state_dict, load_state_dict
    from timm.models.vision_transformer import checkpoint_filter_fn
except ModuleNotFoundError as error:
    if error.name is None or error.name.partition(".")[0] != "timm":
        raise
    raise GrkanImportError('released checkpoints need timm; install it with: pip install "grkan[models]"') from error

from . import kat  # noqa: F401  registers the models
from .build import WrongArgumentsError, build_model
from .metadata import NOT_ARCHITECTURE

_MODELS = {192: "kat_tiny_patch16_224", 384: "kat_small_patch16_224", 768: "kat_base_patch16_224"}
_FORM = "sum_of_abs"
_PATCH = 16


def load_released_checkpoint(
    path_or_state_dict: str | os.PathLike[str] | Mapping[str, Any], *, use_ema: bool = True, **model_args: Any
) -> nn.Module:
    """Load a checkpoint of github.com/Adamdad/kat into a KAT, which computes what their GPU kernels compute.

    Args:
        path_or_state_dict: a .pth or .safetensors file, or its content: the weights, or a mapping that has them under
            state_dict_ema, model_ema, state_dict or model. Names may begin with "module.". timm's loader reads the
            file; it accepts tensors, plain values and `argparse.Namespace`, and runs no code.
        use_ema: take the average of the weights if there is one.
        **model_args: arguments of `timm.create_model`. With another num_classes the head is new; with another img_size
            the position embedding is resampled as timm does.

    Returns:
        kat_tiny, kat_small or kat_base_patch16_224 of the form "sum_of_abs"; on the CPU, float32, in eval mode.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError: path_or_state_dict is neither a path nor a mapping.
        ValueError: the file is damaged, or needs code to be run; it holds no released KAT; or model_args do not fit it.
        ImportError: timm is missing.
    """
    check_flag("use_ema", use_ema)
    if others := sorted({*NOT_ARCHITECTURE} & {*model_args}):
        raise GrkanValueError(
            f"model_args must describe the architecture, as num_classes does; got {', '.join(others)}"
        )
    state, source = _read(path_or_state_dict, use_ema)
    name, arguments = _architecture(state, source)
    if model_args.get("form", _FORM) != _FORM:
        raise GrkanValueError(f"form must be {_FORM!r}, the form of the released weights; got {model_args['form']!r}")
    arguments |= {"form": _FORM}
    try:
        model = build_model(name, {**arguments, **model_args}, right=arguments)
    except WrongArgumentsError as error:
        raise GrkanValueError(f"model_args do not fit the {name} in {source}: {error}") from error
    except (GrkanTypeError, GrkanValueError) as error:
        raise GrkanValueError(f"{source} holds a {name} that cannot be built: {error}") from error
    own = model.state_dict()
    if "head.weight" in own and "head.weight" in state and own["head.weight"].shape != state["head.weight"].shape:
        state |= {key: own[key] for key in ("head.weight", "head.bias")}
    elif model_args.get("num_classes") == 0:
        state = {key: tensor for key, tensor in state.items() if not key.startswith("head.")}
    if unknown := [key for key in state if key.replace(".weight_", ".") not in own]:
        raise GrkanValueError(f"{source} does not fit a {name}, which has no weight {unknown[0]}")
    state = checkpoint_filter_fn(state, model)  # position embeddings for another img_size
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        if not str(error).startswith("Error(s) in loading state_dict"):
            raise
        raise GrkanValueError(f"{source} does not fit a {name}: {' '.join(str(error).split())[:300]}") from error
    return model.float().eval()


def save_released_checkpoint(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a KAT's weights in the released layout, for the authors' code and for `load_released_checkpoint`.

    Args:
        model: a KAT of the form "sum_of_abs" and the order (5, 4), with one numerator for all groups of a function.
        path: a .safetensors file, or any other for `torch.save`. It is written whole or not at all.

    Raises:
        ValueError: the layout cannot hold this model; the message says why.
        OSError: the file cannot be written; or path is a folder, or its folder does not exist.
    """
    modules = check_module("model", model).named_modules()
    functions = {name: module for name, module in modules if isinstance(module, GroupRational)}
    if not functions:
        raise GrkanValueError(f"model must have rational functions; {type(model).__name__} has none")
    state = dict(model.state_dict())
    for name, module in functions.items():
        if module.form != _FORM:
            raise GrkanValueError(f"the released layout supports only the form {_FORM!r}; {name} has {module.form!r}")
        if module.order != (5, 4):
            raise GrkanValueError(f"the released layout supports only the order (5, 4); {name} has {module.order}")
        numerator, denominator = (rows.detach() for rows in module.coefficients())
        if not torch.equal(numerator, numerator[:1].expand_as(numerator)):
            raise GrkanValueError(
                f"the released layout has one numerator for all groups, but the groups of {name} have different ones"
            )
        state[f"{name}.weight_numerator"] = numerator[:1].clone()
        state[f"{name}.weight_denominator"] = denominator.clone()
        for own in ("numerator", "denominator", "_extra_state"):
            del state[f"{name}.{own}"]
    path = Path(path)
    state = {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}
    # Make the content in memory: on a full disk both libraries raise errors of their own, which hide the reason.
    if path.suffix == ".safetensors":
        from safetensors.torch import save

        content = save(state)
    else:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        content = buffer.getvalue()
    write_bytes(path, content)


def _read(source: Any, use_ema: bool) -> tuple[dict[str, Tensor], str]:
    """Return the weights, and a name for their source in error messages."""
    if isinstance(source, Mapping):
        label = "path_or_state_dict"
        keys = (*(("state_dict_ema", "model_ema") if use_ema else ()), "state_dict", "model")
        key = next((key for key in keys if isinstance(source.get(key), Mapping)), None)
        state = clean_state_dict(dict(source if key is None else source[key]))
    elif isinstance(source, (str, os.PathLike)):
        label = str(source)
        if not Path(source).is_file():
            raise FileNotFoundError(f"there is no checkpoint {label}")
        with open(source, "rb"):  # raise OSError, e.g. for missing permission; the loader's may mean a damaged file
            pass
        try:
            state = load_state_dict(label, use_ema)
        except (ImportError, MemoryError):
            raise
        except Exception as error:  # zipfile, pickle, PyTorch and safetensors each raise their own
            reason = " ".join(str(error).split()).partition(" No automatic")[0][:200]
            raise GrkanValueError(
                f"{label} is damaged, is not a checkpoint, or needs to run code: {type(error).__name__}: {reason}"
            ) from error
    else:
        raise GrkanTypeError(f"path_or_state_dict must be a path or a mapping; got {type(source).__name__}")
    if not state or not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()):
        raise GrkanValueError(f"{label} must hold a mapping of names to tensors; it holds something else")
    return {key: value.float() if value.is_floating_point() else value for key, value in state.items()}, label


def _architecture(state: dict[str, Tensor], source: str) -> tuple[str, dict[str, Any]]:
    """Return the name of the model that the weights are for, and the arguments that differ from its defaults."""

    def shape(key: str, dims: int) -> tuple[int, ...]:
        """Return the shape of a tensor, or zeros if it is missing or has another number of dimensions."""
        found = tuple(state[key].shape) if key in state else ()
        return found if len(found) == dims else (0,) * dims

    numerator, denominator = (shape(f"blocks.0.mlp.act1.weight_{part}", 2) for part in ("numerator", "denominator"))
    if 0 in numerator or 0 in denominator:
        kind = (
            "; it looks like a Vision Transformer, which grkan.convert_ turns into a KAT"
            if "cls_token" in state
            else ""
        )
        raise GrkanValueError(
            f"{source} is not a released KAT, because it lacks blocks.0.mlp.act1.weight_numerator or "
            f"blocks.0.mlp.act1.weight_denominator{kind}"
        )
    width, patch, positions = shape("cls_token", 3), shape("patch_embed.proj.weight", 4), shape("pos_embed", 3)
    name = _MODELS.get(width[-1])
    side = round(max(positions[1] - 1, 0) ** 0.5)
    if name is None or patch[2:] != (_PATCH, _PATCH) or side * side != positions[1] - 1:
        raise GrkanValueError(
            f"{source} must hold a KAT of width {', '.join(map(str, _MODELS))} "
            f"with patches of {_PATCH} pixels, a class "
            "token, and positions for a square image; its cls_token, "
            f"patch_embed.proj.weight and pos_embed have shapes {width}, "
            f"{patch} and {positions}"
        )
    blocks = {match[1] for key in state if (match := re.match(r"blocks\.(\d+)\.", key))}
    arguments: dict[str, Any] = {
        "num_classes": shape("head.weight", 2)[0],
        "num_groups": denominator[0],
        "order": (numerator[1] - 1, denominator[1]),
        "share_numerator": numerator[0] == 1,
    }
    standard = {"depth": (len(blocks), 12), "img_size": (side * _PATCH, 224), "in_chans": (patch[1], 3)}
    return name, arguments | {key: found for key, (found, usual) in standard.items() if found != usual}
