"""grkan: the Kolmogorov-Arnold Transformer (arXiv 2409.10594) as a library.

Its main idea is a group-wise rational function in front of a linear layer. This module holds the public names.
Importing it needs only torch. The KAT models are registered with timm when timm is imported, before grkan or after it.
Names that need another package load on first use; if a package is missing, the error says which extra installs it.
"""

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .errors import GrkanImportError
from .integrations.imports import when_imported
from .nn import GRKAN, GroupRational, RationalLinear, no_weight_decay, param_groups, variance_gain
from .rational.dispatch import set_backend
from .rational.op import group_rational, rational_linear

if TYPE_CHECKING:
    from .convert import ConversionReport, convert_
    from .convert.recipe import apply_conversion_
    from .convert.steps import scale_coefficient_steps
    from .export import export, plain
    from .export.library import onnx_library
    from .models.files import load_model, save_model
    from .models.operations import count_operations
    from .models.released import load_released_checkpoint
    from .parallel import GroupParallel
    from .rational.fit import RationalFit, fit

# name -> its module, and the extra that installs what this module imports
_LAZY = {
    "ConversionReport": ("grkan.convert", "fit"),
    "GroupParallel": ("grkan.parallel", "models"),
    "RationalFit": ("grkan.rational.fit", "fit"),
    "apply_conversion_": ("grkan.convert.recipe", "fit"),
    "convert_": ("grkan.convert", "fit"),
    "count_operations": ("grkan.models.operations", "models"),
    "export": ("grkan.export", "models"),
    "fit": ("grkan.rational.fit", "fit"),
    "load_model": ("grkan.models.files", "models"),
    "load_released_checkpoint": ("grkan.models.released", "models"),
    "onnx_library": ("grkan.export.library", "onnx"),
    "plain": ("grkan.export", "models"),
    "save_model": ("grkan.models.files", "models"),
    "scale_coefficient_steps": ("grkan.convert.steps", "fit"),
}

__all__ = [
    "GRKAN",
    "ConversionReport",
    "GroupParallel",
    "GroupRational",
    "RationalFit",
    "RationalLinear",
    "__version__",
    "apply_conversion_",
    "convert_",
    "count_operations",
    "export",
    "fit",
    "group_rational",
    "load_model",
    "load_released_checkpoint",
    "no_weight_decay",
    "onnx_library",
    "param_groups",
    "plain",
    "rational_linear",
    "save_model",
    "scale_coefficient_steps",
    "set_backend",
    "variance_gain",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'grkan' has no attribute {name!r}")
    module, extra = _LAZY[name]
    try:
        value = getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "grkan":
            raise
        raise GrkanImportError(
            f'grkan.{name} needs {error.name}; install it by: pip install "grkan[{extra}]"'
        ) from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _integration(name: str) -> Any:
    return importlib.import_module(f"grkan.integrations.{name}")


def _tell_timm(models: Any) -> None:
    importlib.import_module("grkan.models.kat")
    _integration("timm").know_conversions(models)


# These hooks are here, not in the modules concerned, so that `import grkan` is enough: timm then knows our models,
# transformers the converted ones, and Accelerate their functions, whoever imports these libraries.
when_imported("timm.models", _tell_timm)
when_imported("timm.models._manipulate", lambda module: _integration("initialisers").know_named_apply(module))
# DTensors support only operators that have a sharding rule.
when_imported("torch.distributed.tensor", lambda _: importlib.import_module("grkan.parallel"))
when_imported("transformers.configuration_utils", lambda module: _integration("transformers").know_configs(module))
when_imported("transformers.modeling_utils", lambda module: _integration("transformers").know_models(module))
when_imported(
    "transformers.distributed.tensor_parallel", lambda module: _integration("transformers").know_styles(module)
)
when_imported("transformers.trainer", lambda module: _integration("transformers").know_trainers(module))
when_imported("accelerate.utils.modeling", lambda module: _integration("accelerate").know_extra_state(module))
when_imported("accelerate.utils.fsdp_utils", lambda module: _integration("accelerate").know_sharded_loading(module))
when_imported("peft.utils.save_and_load", lambda module: _integration("peft").know_adapters(module))
when_imported("liger_kernel.transformers.monkey_patch", lambda module: _integration("liger").know_kernels(module))
when_imported("huggingface_hub.hub_mixin", lambda module: _integration("hub").know_mixin(module.ModelHubMixin))
when_imported("diffusers.models.modeling_utils", lambda module: _integration("hub").know_mixin(module.ModelMixin))
when_imported("sentence_transformers.base.model", lambda module: _integration("hub").know_sequences(module.BaseModel))
when_imported(  # the name before sentence-transformers 6
    "sentence_transformers.SentenceTransformer",
    lambda module: _integration("hub").know_sequences(module.SentenceTransformer),
)
