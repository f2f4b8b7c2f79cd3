"""Kolmogorov-Arnold Transformers in timm's registry, and the models that the small ones are compared with.

Importing this module registers them: `timm.create_model("kat_tiny_patch16_224")`. Names of models that are not a KAT
begin with grkan_, to avoid clashes.
"""

import inspect
from functools import partial
from typing import Any

from ..errors import GrkanImportError, GrkanTypeError, GrkanValueError

try:
    from timm.data import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
    from timm.layers import Attention, Mlp
    from timm.models import VisionTransformer, build_model_with_cfg, generate_default_cfgs, register_model
    from timm.models.vision_transformer import checkpoint_filter_fn
except ModuleNotFoundError as error:
    if error.name is None or error.name.partition(".")[0] != "timm":
        raise
    raise GrkanImportError('grkan.models needs timm; install it with: pip install "grkan[models]"') from error

import torch
from torch import Tensor, nn

from ..nn import GRKAN, no_weight_decay, variance_gain
from ..nn.init import WEIGHT_INITS, assign_, init_linear_
from ..rational.arguments import check_choice
from .spline import SplineMlp

__all__ = ["KAT"]  # register_model adds the entrypoints

TIMM_WEIGHT_INITS = ("", "jax", "jax_nlhb", "moco", "reset", "skip")


class KAT(VisionTransformer):
    """timm's VisionTransformer with `GRKAN` as its MLP (arXiv 2409.10594).

    Args:
        *args, **kwargs: as for timm's VisionTransformer. `weight_init` keeps its meaning for everything but the MLPs,
            which initialise themselves; `fix_init` scales their fc2 down afterwards, as in timm. `act_layer` has no
            effect on them. An `mlp_layer` must take the arguments of `GRKAN`, and a `block_fn` must use it.
        num_groups, order, act_init, form, share_numerator: of the rational functions, as for `GRKAN`.
        mlp_init: "variance_preserving", or "trunc_normal" for the standard deviation 0.02 of the released code.
        attn_init: None to follow `weight_init`, or "mimetic", see `MimeticAttention`.

    Raises:
        TypeError, ValueError, ImportError: as for `GRKAN`.

    Shape:
        (N, in_chans, H, W) to (N, num_classes).
    """

    def __init__(
        self,
        *args: Any,
        num_groups: int = 8,
        order: tuple[int, int] = (5, 4),
        act_init: tuple[Any, Any] = ("identity", "swish"),
        form: str = "abs_of_sum",
        share_numerator: bool = False,
        mlp_init: str = "variance_preserving",
        attn_init: str | None = None,
        **kwargs: Any,
    ) -> None:
        check_choice("weight_init", kwargs.get("weight_init", ""), TIMM_WEIGHT_INITS)
        mlp_layer = kwargs.get("mlp_layer", GRKAN)
        arguments: dict[str, Any] = {
            "num_groups": num_groups,
            "order": order,
            "act_init": act_init,
            "form": form,
            "share_numerator": share_numerator,
            "weight_init": check_choice("mlp_init", mlp_init, WEIGHT_INITS),
        }
        try:
            inspect.signature(mlp_layer).bind_partial(**arguments)
        except (TypeError, ValueError):  # ValueError: a builtin whose arguments Python does not know
            raise GrkanTypeError(
                f"mlp_layer must be GRKAN, or take its arguments {', '.join(arguments)}; got {mlp_layer!r}"
            ) from None
        kwargs["mlp_layer"] = partial(mlp_layer, **arguments)
        if check_choice("attn_init", attn_init, (None, "mimetic")):
            if "attn_layer" in kwargs:
                raise GrkanValueError(
                    f"attn_layer must be left out with attn_init='mimetic', which sets it; got {kwargs['attn_layer']!r}"
                )
            kwargs["attn_layer"] = MimeticAttention
        super().__init__(*args, **kwargs)
        if self.blocks and not no_weight_decay(self):
            raise GrkanValueError(
                f"block_fn must use mlp_layer, and no block has a rational function; got {kwargs.get('block_fn')!r}"
            )

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters without weight decay: timm's, and all rational coefficients."""
        return set(super().no_weight_decay()) | no_weight_decay(self)


class MimeticAttention(Attention):
    """timm's Attention with the mimetic initialisation (Trockman and Kolter, arXiv 2305.09828).

    In every head W_Q W_K^T is the best approximation of its rank to 0.7 Z + 0.7 I, and over all heads
    W_V W_proj = 0.4 Z - 0.4 I, where each Z ~ N(0, 1/d) is a new draw. Biases are 0.

    A singular value decomposition factorises the draws, so a model of width 768 takes about a minute.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.init_weights()

    def init_weights(self) -> None:
        """Draw the weights again."""
        # PyTorch's linear layers store W^T, and the rows of qkv are those of q, k and v, head after head.
        weight = self.qkv.weight
        heads = [_factors(weight, self.head_dim, 0.7, 0.7) for _ in range(self.num_heads)]
        query, key = zip(*heads, strict=True)
        value, out = _factors(weight, weight.shape[0] // 3, 0.4, -0.4)
        assign_(weight, torch.cat([*query, *key, value], dim=1).T, src_rank=0)
        assign_(self.proj.weight, out, src_rank=0)
        for layer in (self.qkv, self.proj):
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def reset_parameters(self) -> None:
        """Alias of `init_weights`."""
        self.init_weights()


def _factors(like: Tensor, rank: int, noise: float, identity: float) -> tuple[Tensor, Tensor]:
    """Return L, R of (d, rank): L R^T best approximates noise Z + identity I with that rank; `like` has d columns."""
    width = like.shape[1]
    if like.is_meta:
        return (torch.empty(width, rank, device="meta"),) * 2
    # PyTorch has no decomposition for half types.
    placed: dict[str, Any] = {"dtype": torch.promote_types(like.dtype, torch.float32), "device": like.device}
    target = noise / width**0.5 * torch.randn(width, width, **placed) + identity * torch.eye(width, **placed)
    u, s, vt = torch.linalg.svd(target)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, vt[:rank].T * root


class _InitialisedMlp(Mlp):
    """timm's Mlp with the initialisation of `GRKAN`, for a fair comparison of the two."""

    def __init__(self, *args: Any, weight_init: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.weight_init = weight_init
        self.init_weights()

    def init_weights(self) -> None:
        init_linear_(self.fc1, 1.0, self.weight_init)
        normed = not isinstance(self.norm, nn.Identity)
        init_linear_(self.fc2, 1.0 if normed else variance_gain(self.act), self.weight_init)

    def reset_parameters(self) -> None:
        self.init_weights()


def _create(model_cls: Any, architecture: str, pretrained: bool, given: dict[str, Any], **fixed: Any) -> Any:
    """Build a model, and store its arguments in it, so that `grkan.save_model` needs only the model."""
    kwargs = {**fixed, **given}
    feature_cfg = {"out_indices": kwargs.pop("out_indices", 3), "feature_cls": "getter"}
    model = build_model_with_cfg(
        model_cls,
        architecture,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=feature_cfg,
        **kwargs,
    )
    model.grkan_arguments = given
    return model


def _vit(mlp_init: str | None = None, **kwargs: Any) -> VisionTransformer:
    """Build timm's VisionTransformer; mlp_init None leaves the MLP to `weight_init`."""
    check_choice("weight_init", kwargs.get("weight_init", ""), TIMM_WEIGHT_INITS)
    if check_choice("mlp_init", mlp_init, (None, *WEIGHT_INITS)) is not None:
        kwargs["mlp_layer"] = partial(_InitialisedMlp, weight_init=mlp_init)
    return VisionTransformer(**kwargs)


def _cfg(channels: int, size: int, **kwargs: Any) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (channels, size, size),
        "pool_size": None,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": IMAGENET_INCEPTION_MEAN[:channels],
        "std": IMAGENET_INCEPTION_STD[:channels],
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        **kwargs,
    }


_micro_cfg = partial(_cfg, num_classes=10, crop_pct=1.0)

default_cfgs = generate_default_cfgs(
    {
        "kat_tiny_patch16_224": _cfg(3, 224),
        "kat_small_patch16_224": _cfg(3, 224),
        "kat_base_patch16_224": _cfg(3, 224),
        "kat_micro_patch2_8": _micro_cfg(1, 8),
        "kat_micro_patch4_28": _micro_cfg(1, 28),
        "kat_micro_patch4_32": _micro_cfg(3, 32),
        "grkan_vit_micro_patch2_8": _micro_cfg(1, 8),
        "grkan_vit_micro_patch4_28": _micro_cfg(1, 28),
        "grkan_vit_kan_micro_patch4_28": _micro_cfg(1, 28),
        "grkan_vit_micro_patch4_32": _micro_cfg(3, 32),
    }
)


def twin_of(name: str) -> str:
    """Return the name of the Vision Transformer of the same size as a KAT: timm's, or ours for the micro models."""
    return ("grkan_" if "_micro_" in name else "") + name.replace("kat_", "vit_", 1)


_MICRO: dict[str, Any] = {"embed_dim": 96, "depth": 4, "num_heads": 3}


@register_model
def kat_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> KAT:
    """KAT-T: width 192, 12 blocks, 3 heads."""
    size = {"patch_size": 16, "embed_dim": 192, "depth": 12, "num_heads": 3}
    return _create(KAT, "kat_tiny_patch16_224", pretrained, kwargs, **size)


@register_model
def kat_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> KAT:
    """KAT-S: width 384, 12 blocks, 6 heads."""
    size = {"patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6}
    return _create(KAT, "kat_small_patch16_224", pretrained, kwargs, **size)


@register_model
def kat_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> KAT:
    """KAT-B: width 768, 12 blocks, 12 heads."""
    size = {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12}
    return _create(KAT, "kat_base_patch16_224", pretrained, kwargs, **size)


@register_model
def kat_micro_patch2_8(pretrained: bool = False, **kwargs: Any) -> KAT:
    """A KAT for two cores: width 96, 4 blocks, 3 heads; 8x8 gray images, such as scikit-learn's digits."""
    return _create(KAT, "kat_micro_patch2_8", pretrained, kwargs, patch_size=2, **_MICRO)


@register_model
def kat_micro_patch4_28(pretrained: bool = False, **kwargs: Any) -> KAT:
    """A KAT for two cores: width 96, 4 blocks, 3 heads; 28x28 gray images, such as Fashion-MNIST."""
    return _create(KAT, "kat_micro_patch4_28", pretrained, kwargs, patch_size=4, **_MICRO)


@register_model
def kat_micro_patch4_32(pretrained: bool = False, **kwargs: Any) -> KAT:
    """A KAT for two cores: width 96, 4 blocks, 3 heads; 32x32 RGB images, such as CIFAR-10."""
    return _create(KAT, "kat_micro_patch4_32", pretrained, kwargs, patch_size=4, **_MICRO)


@register_model
def grkan_vit_micro_patch2_8(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """The Vision Transformer of the size of `kat_micro_patch2_8`; it also takes mlp_init."""
    return _create(_vit, "grkan_vit_micro_patch2_8", pretrained, kwargs, patch_size=2, **_MICRO)


@register_model
def grkan_vit_micro_patch4_28(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """The Vision Transformer of the size of `kat_micro_patch4_28`; it also takes mlp_init."""
    return _create(_vit, "grkan_vit_micro_patch4_28", pretrained, kwargs, patch_size=4, **_MICRO)


@register_model
def grkan_vit_micro_patch4_32(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """The Vision Transformer of the size of `kat_micro_patch4_32`; it also takes mlp_init."""
    return _create(_vit, "grkan_vit_micro_patch4_32", pretrained, kwargs, patch_size=4, **_MICRO)


@register_model
def grkan_vit_kan_micro_patch4_28(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """`grkan_vit_micro_patch4_28` with two B-spline KAN layers, d to d, as MLP; KAT's paper calls it ViT with KAN."""
    size = {"patch_size": 4, "mlp_ratio": 1.0, "mlp_layer": SplineMlp, **_MICRO}
    return _create(VisionTransformer, "grkan_vit_kan_micro_patch4_28", pretrained, kwargs, **size)
