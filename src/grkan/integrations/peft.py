"""Let PEFT notice adapters of a converted model that are loaded into a model without its functions."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

from ..errors import GrkanValueError, first_of
from .imports import put_around


def know_adapters(save_and_load: ModuleType) -> None:
    """Refuse trained functions that the model has no place for; PEFT leaves out what it does not expect."""
    put_around(save_and_load, "set_peft_model_state_dict", _setting)


def _setting(load: Callable[..., Any]) -> Callable[..., Any]:
    def set_peft_model_state_dict(model: Any, *args: Any, **kwargs: Any) -> Any:
        result = load(model, *args, **kwargs)
        unexpected = getattr(result, "unexpected_keys", None) or ()
        lost = [key.rpartition(".")[0] for key in unexpected if key.endswith(".numerator")]
        if lost:
            raise GrkanValueError(
                "the adapter must be loaded into the model that it was trained with, a converted one: it has rational "
                f"functions for {first_of(lost)}, where this model has none. Load the model that save_pretrained wrote "
                "after the conversion, or convert this one by grkan.apply_conversion_ first"
            )
        return result

    return set_peft_model_state_dict
