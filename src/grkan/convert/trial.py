"""Make an input for a model when there are no data: only the operations of the run matter, not its results."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.modes import evaluating

_TOKENS = ((7, 6, 0, 0, 1, 5), (1, 2, 3, 0, 0, 4))
_SIZES = (224, 64, 32)


def trial_run(model: nn.Module) -> Callable[[], Any] | None:
    """Return a function that runs the model once, in eval mode; None if no input is found that the model accepts."""
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    if parameter is None or any(p.is_meta for p in model.parameters()):
        return None
    for arguments in _candidates(model):
        run = partial(_call, model, _placed(arguments, parameter))
        try:
            with evaluating(model):
                run()
        except Exception:  # an input for another model
            continue
        return run
    return None


def _call(model: nn.Module, arguments: Any) -> Any:
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(0)
        return model(**arguments) if isinstance(arguments, Mapping) else model(arguments)


def _placed(value: Any, like: Tensor) -> Any:
    """Move tensors to the device of a parameter, floating-point ones also to its dtype."""
    if isinstance(value, Mapping):
        return {key: _placed(part, like) for key, part in value.items()}
    if isinstance(value, Tensor):
        return value.to(like.device, like.dtype if value.is_floating_point() else value.dtype)
    return value


def _random(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)  # the global one is the user's
    return torch.randn(shape, generator=generator, device="cpu")


def _candidates(model: nn.Module) -> Iterator[Any]:
    config = getattr(model, "config", None)
    if config is not None and hasattr(model, "main_input_name"):  # transformers
        yield from _of_transformers(model, config)
        return
    settings: Any = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    size = getattr(getattr(model, "patch_embed", None), "img_size", None) or getattr(model, "image_size", None)
    if isinstance(settings, Mapping) and len(settings.get("input_size", ())) == 3:  # timm
        channels, *sides = settings["input_size"]
        yield _random(1, channels, *(size if isinstance(size, (tuple, list)) else sides))
    first = next((m for m in model.modules() if not any(True for _ in m.children()) and m._parameters), None)
    weight = getattr(first, "weight", None)
    if isinstance(first, nn.Embedding):
        yield torch.tensor(_TOKENS, device="cpu") % first.num_embeddings
    elif isinstance(weight, Tensor) and isinstance(first, nn.Conv2d):
        for side in dict.fromkeys((size if isinstance(size, int) else 224, *_SIZES)):
            yield _random(1, first.in_channels, side, side)
    elif isinstance(weight, Tensor) and weight.dim() in (1, 2):
        for shape in ((2, 3), (2,)):
            yield _random(*shape, weight.shape[-1])


def _of_transformers(model: Any, config: Any) -> Iterator[dict[str, Any]]:
    tokens = torch.tensor(_TOKENS, device="cpu")
    decoder = {"decoder_input_ids": tokens} if getattr(config, "is_encoder_decoder", False) else {}
    vision = getattr(config, "vision_config", config)
    side, channels = getattr(vision, "image_size", None) or 224, getattr(vision, "num_channels", None) or 3
    sides = side if isinstance(side, (tuple, list)) else (side, side)
    if model.main_input_name == "pixel_values":
        yield {"pixel_values": _random(1, channels, *sides)}
        yield {"pixel_values": _random(1, channels, *sides), **decoder}
    if model.main_input_name == "input_ids":
        yield {"input_ids": tokens, **decoder}
        yield {"input_ids": tokens, "pixel_values": _random(2, channels, *sides)}
    if model.main_input_name == "input_features" and getattr(config, "num_mel_bins", None):
        length = 2 * (getattr(config, "max_source_positions", None) or 50)
        yield {
            "input_features": _random(1, config.num_mel_bins, length),
            **({"decoder_input_ids": tokens[:1]} if decoder else {}),
        }
    if model.main_input_name == "input_values":
        yield {"input_values": _random(1, 16000)}
    try:
        yield dict(model.dummy_inputs)
    except Exception:  # not every model has some
        return
