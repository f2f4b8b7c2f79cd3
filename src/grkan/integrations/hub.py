"""Keep classes whose files cannot hold a conversion from saving one: loading would give another model, in silence."""

from collections.abc import Callable
from typing import Any

from torch import nn

from ..convert.recipe import recipe_of
from ..errors import GrkanValueError
from .imports import put_around


def know_mixin(mixin: type) -> None:
    """Let `save_pretrained` of a class refuse converted models, before it writes anything."""
    put_around(mixin, "save_pretrained", _saving)


def _saving(save: Callable[..., Any]) -> Callable[..., Any]:
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self, nn.Module) and recipe_of(self) is not None:  # the mixin is for other frameworks, too
            raise GrkanValueError(
                f"model must not be converted to be saved by save_pretrained of {type(self).__name__}, whose files "
                "have no place for the conversion. Save ConversionReport.recipe as JSON and the state dict; to restore "
                "them, call grkan.apply_conversion_, then load_state_dict"
            )
        return save(self, *args, **kwargs)

    return save_pretrained
