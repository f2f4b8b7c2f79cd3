"""Keep classes whose files cannot hold a conversion from saving one: loading would give another model, in silence."""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from ..convert.recipe import recipe_of
from ..errors import GrkanValueError, first_of
from ..nn.wrappers import plain_name
from .imports import put_around


def know_mixin(mixin: type) -> None:
    """Let `save_pretrained` of a class refuse converted models, before it writes anything."""
    put_around(mixin, "save_pretrained", partial(_saving, _converted))


def know_sequences(kind: type) -> None:
    """Let `save` of sentence-transformers' models refuse conversions that no model of transformers in them saves."""
    owner = next(base for base in kind.__mro__ if "save" in vars(base))
    put_around(owner, "save", partial(_saving, _converted_outside))


def _saving(lost: Callable[[nn.Module], list[str]], save: Callable[..., Any]) -> Callable[..., Any]:
    def saving(self: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self, nn.Module) and (names := lost(self)):  # the mixin is for other frameworks, too
            raise GrkanValueError(
                f"model must not be converted to be saved by {save.__name__} of {type(self).__name__}, whose files "
                f"have no place for the conversion of {first_of(names)}. Save ConversionReport.recipe as JSON and the "
                "state dict; to restore them, call grkan.apply_conversion_, then load_state_dict"
            )
        return save(self, *args, **kwargs)

    return saving


def _converted(model: nn.Module) -> list[str]:
    recipe = recipe_of(model)
    return [] if recipe is None else [layer.activation for layer in recipe.layers]


def _converted_outside(model: nn.Module) -> list[str]:
    """Return the functions outside of all models of transformers, whose config.json holds their conversion."""
    recipe = recipe_of(model)
    saver = getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", ())
    parts = tuple(f"{plain_name(name)}." for name, module in model.named_modules() if isinstance(module, saver))
    layers = () if recipe is None else recipe.layers
    return [layer.activation for layer in layers if not f"{layer.home}.".startswith(parts)]
