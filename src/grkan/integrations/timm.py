"""Let timm save a model that `grkan.convert_` has converted for its hub, and build it again, like any other.

config.json names the architecture `grkan_converted`, which timm has only if grkan is imported. Its argument is the
conversion. grkan's other models are in timm's registry under their own names.
"""

import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from timm.models import create_model, load_pretrained, register_model
from torch import nn

from ..convert.recipe import apply_recipe, check_recipe, recipe_of
from ..errors import GrkanValueError
from .imports import put_around

_NAME = "grkan_converted"


def know_conversions(models: ModuleType) -> None:
    """Let `save_for_hf` and `push_to_hf_hub` write converted models, and `create_model` read them."""
    put_around(sys.modules[f"{models.__name__}._hub"], "save_config_for_hf", _saving)
    # Keep it out of `list_models`: code that creates every listed model by name alone cannot create this one.
    hidden = getattr(sys.modules[f"{models.__name__}._registry"], "_deprecated_models", {})
    hidden[_NAME] = None


def _saving(save: Callable[..., Any]) -> Callable[..., Any]:
    def save_config_for_hf(model: nn.Module, config_path: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        save(model, config_path, *args, **kwargs)
        path = Path(config_path)
        config = json.loads(path.read_text(encoding="utf-8"))
        arguments = config.get("model_args", {})
        arguments.pop("grkan", None)  # what the model was made from
        if (recipe := recipe_of(model)) is not None:
            arguments["grkan"] = {"architecture": config["architecture"], "conversion": recipe.to_dict()}
            path.write_text(json.dumps({**config, "architecture": _NAME, "model_args": arguments}, indent=2), "utf-8")

    return save_config_for_hf


@register_model
def grkan_converted(
    pretrained: bool = False,
    pretrained_cfg: Any = None,
    cache_dir: Any = None,
    grkan: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Build a converted model of another architecture, for `timm.create_model("local-dir:FOLDER", pretrained=True)`.

    Args:
        pretrained, pretrained_cfg, cache_dir, kwargs: as for every timm model.
        grkan: a mapping with architecture, a name in timm's registry, and conversion, a recipe.

    Raises:
        ValueError: grkan is None; or the conversion is not a recipe, or does not fit the model.
    """
    if grkan is None:
        raise GrkanValueError(
            f"{_NAME} can only be made from a saved model: save one with timm.models.save_for_hf, and load it with "
            "timm.create_model('local-dir:FOLDER')"
        )
    name, recipe = grkan["architecture"], check_recipe(grkan["conversion"])
    if isinstance(pretrained_cfg, Mapping):
        pretrained_cfg = {**pretrained_cfg, "architecture": name}
    kwargs.pop("pretrained_model_args", None)
    model = create_model(name, pretrained_cfg=pretrained_cfg, **kwargs)
    apply_recipe(model, recipe)
    if pretrained:
        # Load as timm does for this architecture: it interpolates a position embedding of another size, and so on.
        filter_fn = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
        load_pretrained(
            model,
            num_classes=model.num_classes,
            in_chans=kwargs.get("in_chans", 3),
            filter_fn=filter_fn,
            cache_dir=cache_dir,
        )
    return model
