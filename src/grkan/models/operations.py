"""Count the operations of a model for one image."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils.flop_counter import FlopCounterMode

from ..errors import GrkanTypeError, GrkanValueError
from ..nn import GroupRational
from ..rational.arguments import check_module, check_positive


def count_operations(model: nn.Module, input_size: Sequence[int] = (3, 224, 224)) -> dict[str, int]:
    """Count parameters and operations of a model for one input, on the meta device, so that nothing is computed.

    Args:
        model: any module that takes one float tensor; it is not changed.
        input_size: the shape of the input without its batch dimension; (channels, height, width) for images.

    Returns:
        A dict with three counts:

        - `parameters`: the number of scalars in `model.parameters()`.
        - `paper_operations`: as counted in arXiv 2409.10594: the multiply-adds of linear and convolution layers without
          the products of attention, plus 5 for each scalar that passes a LayerNorm, plus 2m + 2n + 3 for each that
          passes a rational function of order (m, n). Other activations count nothing.
        - `multiply_adds`: those of all matrix products and convolutions, including q k^T and the product with v, and
          nothing else. Other tools call them MACs; `torch.utils.flop_counter` counts twice as many.

    Raises:
        TypeError: model is not a module; input_size is not a sequence of ints.
        ValueError: input_size has a number below 1, or the model does not take an input of that size; the message gives
            the reason.
    """
    check_module("model", model)
    if not isinstance(input_size, Sequence) or isinstance(input_size, str):
        raise GrkanTypeError(f"input_size must be a sequence of ints, as (3, 224, 224); got {input_size!r}")
    input_size = tuple(check_positive("each number of input_size", size) for size in input_size)
    # deepcopy takes the copies in the memo instead of copying the weights, so a large model needs no extra memory.
    memo = {id(t): _on_meta(t) for t in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, memo).to("meta", torch.float32).eval()
    paper = 0

    def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal paper
        if isinstance(module, GroupRational):
            m, n = module.order
            paper += inputs[0].numel() * (2 * m + 2 * n + 3)
        elif isinstance(module, nn.Linear):
            paper += output.numel() * module.in_features
        elif isinstance(module, _ConvNd):
            paper += output.numel() * module.weight[0].numel()
        elif isinstance(module, nn.LayerNorm):
            paper += inputs[0].numel() * 5

    # Hooks also make a layer run its functions and linear layers as separate modules, which can be counted.
    for module in twin.modules():
        if isinstance(module, (GroupRational, nn.Linear, _ConvNd, nn.LayerNorm)):
            module.register_forward_hook(add)
    counter = FlopCounterMode(display=False)
    try:
        with torch.no_grad(), counter:
            twin(torch.empty(1, *input_size, dtype=torch.float32, device="meta"))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise GrkanValueError(f"input_size must fit the model; got {input_size}: {error}") from error
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "paper_operations": paper,
        "multiply_adds": counter.get_total_flops() // 2,
    }


def _on_meta(t: Tensor) -> Tensor:
    meta = torch.empty_like(t, device="meta")
    return nn.Parameter(meta, requires_grad=t.requires_grad) if isinstance(t, nn.Parameter) else meta
