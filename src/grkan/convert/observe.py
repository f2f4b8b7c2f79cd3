"""Observe a run of a model to find which elementwise functions it computes, and where.

Every operation is seen as PyTorch dispatches it, so none is missed, however the model is written. Each result records
where it comes from: from a linear layer (a product with weights of the model, or a 1x1 convolution) through nothing but
cheap operations (norms, products, dropout, views, depthwise convolutions), or from anything else. An activation belongs
to a feed-forward part if its input comes from a linear layer, and everything computed from its output goes into one.
This excludes a convolutional stem, the gates of a state space and a router.
"""

import ast
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from . import calls, expressions

# Operators that may be an activation, without the trailing underscore of in-place ones.
ELEMENTWISE = frozenset(
    (
        "relu", "relu6", "gelu", "silu", "mish", "hardswish", "hardtanh", "tanh", "sigmoid", "hardsigmoid", "elu",
        "celu", "selu", "leaky_relu", "softplus", "prelu", "erf", "_prelu_kernel", "log_sigmoid_forward",
        "threshold", "softshrink", "hardshrink", "rrelu_with_noise", "clamp_min",
    )
)  # fmt: skip
# Operators that may be one if their input comes from a linear layer. Elsewhere they are parts of positions or losses.
_RARELY = frozenset(("sin", "cos", "sinc", "atan", "asinh", "expm1", "log1p"))
_LINEAR = frozenset(
    (
        "mm", "addmm", "bmm", "baddbmm", "linear", "matmul", "mv", "addmv", "_grouped_mm", "_scaled_mm", "addbmm",
    )
)  # fmt: skip
# Operators that may be part of an activation.
_PARTS = frozenset(("sigmoid", "tanh", "erf", "softplus")) | _RARELY
# Operators that may lie between one linear layer and the next.
_CHEAP = ELEMENTWISE | _RARELY | frozenset(
    (
        "view", "_unsafe_view", "reshape", "_reshape_alias", "transpose", "permute", "t", "slice", "select", "split",
        "split_with_sizes", "unbind", "expand", "squeeze", "unsqueeze", "clone", "contiguous", "_to_copy", "detach",
        "alias", "as_strided", "cat", "stack", "index", "index_select", "gather", "narrow", "constant_pad_nd", "pad",
        "roll", "masked_fill", "where", "native_dropout", "dropout", "mul", "div", "add", "sub", "rsub", "neg",
        "pow", "square", "sqrt", "rsqrt", "mean", "sum", "var", "std", "linalg_vector_norm", "norm", "abs",
        "reciprocal", "addcmul", "native_layer_norm", "native_batch_norm", "_native_batch_norm_legit",
        "_native_batch_norm_legit_no_training", "native_group_norm", "cudnn_batch_norm", "_batch_norm_impl_index",
        "_fused_rms_norm", "rms_norm", "glu", "unfold", "lift_fresh", "movedim", "chunk", "flip", "bernoulli",
        "maximum", "minimum", "clamp", "repeat", "copy", "index_put", "exp",
    )
)  # fmt: skip


@dataclass(eq=False)
class _Node:
    """A tensor of the run, and the tensors made from it."""

    origin: str
    """Where it comes from: "linear", "weight" (only weights), "input" (given), or a phrase for a message."""
    channels: int | None = None
    """The channel dimension of the linear layer, counted from the end."""
    fresh: bool = False
    """Whether it is itself the output of a linear layer."""
    users: list[tuple[str, "_Node", str]] = field(default_factory=list)
    """(operation, result, origin of the tensor that this one is combined with)."""


@dataclass(eq=False)
class Seen:
    """A place in the code where an elementwise operation runs."""

    operation: str
    owner: nn.Module
    """The module whose method runs it."""
    code: CodeType
    offset: int
    """The offset of the instruction in the code."""
    outer: nn.Module | None
    """The module that calls the owner."""
    function: Callable[[Tensor], Any] | None = None
    """The call as a function of its tensor alone."""
    slot: str | None = None
    """The attribute of the owner that holds the called function, if any."""
    label: str = ""
    call: calls.CallRecipe | None = None
    problem: str = ""
    """Why the call cannot be changed."""
    inputs: list[_Node] = field(default_factory=list)
    outputs: list[_Node] = field(default_factory=list)
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    """The shapes of the inputs; () for a nested tensor."""


class Observation:
    """What a run showed."""

    def __init__(self) -> None:
        self.places: dict[Any, Seen] = {}
        self.called: set[nn.Module] = set()

    def of_module(self, module: nn.Module, parent: nn.Module) -> list[Seen]:
        """Return the places that ran inside a module: those that ran when `parent` called it, or else all of them."""
        inside = set(module.modules())
        found = [seen for seen in self.places.values() if seen.owner in inside]
        return [seen for seen in found if seen.outer is parent] or found

    def of_attribute(self, owner: nn.Module, slot: str) -> list[Seen]:
        """Return the places that call the function in an attribute."""
        return [seen for seen in self.places.values() if seen.owner is owner and seen.slot == slot]


def observe(model: nn.Module, run: Callable[[], Any]) -> Observation:
    """Run a model and return what was seen.

    Raises:
        Exception: whatever the run raises.
    """
    recorder = _Recorder(model)
    called = recorder.observation.called
    hook = nn.modules.module.register_module_forward_pre_hook(lambda module, _: called.add(module))
    try:
        with all_parts_run(), recorder:
            run()
    finally:
        hook.remove()
    return recorder.observation


@contextmanager
def all_parts_run() -> Iterator[None]:
    """Keep models off PyTorch's fast path, which calls none of the parts of an encoder layer."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


class _Recorder(TorchDispatchMode):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.modules = {id(module) for module in model.modules()}
        self.nodes: Any = WeakTensorKeyDictionary()
        for weight in (*model.parameters(), *model.buffers()):
            self.nodes[weight] = _Node("weight")
        self.observation = Observation()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        name = name[:-1] if name.endswith("_") and not name.endswith("__") else name
        inputs = [(t, self.node(t)) for t in _tensors((*args, *(kwargs or {}).values()))]
        try:
            made = _node(name, args, inputs, output)
        except Exception:  # an unforeseen use of an operation: its result does not count as a linear layer's
            made = _Node(name)
        results = list(_tensors((output,)))
        for tensor in results:
            channels = made.channels if made.channels is None or -made.channels <= tensor.dim() else None
            child = _Node(made.origin, channels, made.fresh)
            for _, node in inputs:
                others = [n.origin for _, n in inputs if n is not node]
                foreign = next((origin for origin in others if origin not in ("linear", "weight", "input")), "")
                node.users.append((name, child, foreign))
            self.nodes[tensor] = child
        if inputs and inputs[0][0].numel() > 1 and _may_be_activation(name, args, inputs[0][1]):
            self.note(name, inputs[0], [self.nodes[tensor] for tensor in results], func)
        return output

    def node(self, tensor: Tensor) -> _Node:
        found = self.nodes.get(tensor)
        if found is None:
            found = self.nodes[tensor] = _Node("input")
        return found

    def note(self, name: str, source: tuple[Tensor, _Node], results: list[_Node], func: Any) -> None:
        frames = list(self.frames())
        if not frames:
            return
        frame, owner = frames[0]
        outer = next((module for _, module in frames if module is not owner), None)
        key = id(owner), id(outer), frame.f_code, frame.f_lasti
        places = self.observation.places
        if key not in places:
            places[key] = _examine(name, frame, owner, outer)
        seen = places[key]
        seen.inputs.append(source[1])
        seen.outputs += results[:1]
        seen.shapes.append(() if source[0].is_nested else tuple(source[0].shape))

    def frames(self) -> Iterator[tuple[FrameType, nn.Module]]:
        """Yield the running methods of modules of the model, the innermost first."""
        frame: FrameType | None = sys._getframe(3)
        # Not beyond the run: reading the local variables of a caller would keep all of them alive until it returns.
        while frame is not None and frame.f_code is not observe.__code__:
            code = frame.f_code
            if code.co_varnames and not code.co_filename.endswith(("nn/modules/module.py", "nn\\modules\\module.py")):
                owner = frame.f_locals.get(code.co_varnames[0])
                if not isinstance(owner, nn.Module):  # a function inside a method
                    owner = frame.f_locals.get("self")
                if isinstance(owner, nn.Module) and id(owner) in self.modules:
                    yield frame, owner
            frame = frame.f_back


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)


def _may_be_activation(name: str, args: Any, source: _Node) -> bool:
    if name == "clamp":
        return _is_relu(args)
    return name in ELEMENTWISE or (name in _RARELY and source.origin == "linear")


def _is_relu(args: Any) -> bool:
    """Return whether these are the arguments of `clamp(x, 0)`; a bound may also be a tensor."""
    return len(args) > 1 and isinstance(args[1], (int, float)) and args[1] == 0 and (len(args) < 3 or args[2] is None)


def _node(name: str, args: Any, inputs: list[tuple[Tensor, _Node]], output: Any) -> _Node:
    """Return the node for the results of an operation."""
    if name == "embedding":
        return _Node("an embedding")
    result = next(_tensors((output,)), None)
    data = [(tensor, node) for tensor, node in inputs if node.origin != "weight" and tensor.is_floating_point()]
    if not data:
        weights = any(node.origin == "weight" for _, node in inputs)
        return _Node("weight" if weights else "input")
    if name.endswith("_like") or name.startswith("new_") or result is None or not result.is_floating_point():
        return _Node("input")
    if name in _LINEAR:
        if len(data) == len(inputs):
            return _Node(f"a product of activations ({name})")
        left = inputs[1 if name.startswith(("add", "badd")) else 0][1]
        return _Node("linear", -2 if left.origin == "weight" and "mv" not in name else -1, fresh=True)
    if name in ("convolution", "_convolution", "conv1d", "conv2d", "conv3d", "mkldnn_convolution"):
        weight = inputs[1][0]
        if all(size == 1 for size in weight.shape[2:]):
            return _Node("linear", 1 - weight.dim(), fresh=True)
        if weight.shape[1] != 1 or weight.shape[0] == 1:
            return _Node("a convolution")
        return _Node(data[0][1].origin, data[0][1].channels)  # depthwise
    strange = next((node.origin for _, node in data if node.origin not in ("linear", "input")), None)
    if name not in _CHEAP:
        return _Node(name)
    if strange is not None:
        return _Node(strange)
    source, node = next(((t, n) for t, n in data if n.origin == "linear"), data[0])
    if node.origin != "linear" or node.channels is None:
        return _Node(node.origin)
    return _Node(node.origin, _moved(name, args, source, node.channels, result))


def _moved(name: str, args: Any, source: Tensor, channels: int, result: Tensor) -> int | None:
    """Return the channel dimension of a cheap operation's result, counted from the end; None if it is unknown."""
    rank = source.dim()
    at = rank + channels
    if name == "t":
        return -1 if rank == 2 and at == 0 else -2
    if name == "transpose":
        order = list(range(rank))
        a, b = args[1] % rank, args[2] % rank
        order[a], order[b] = b, a
        return order.index(at) - rank
    if name == "permute":
        return [d % rank for d in args[1]].index(at) - rank
    if name in ("view", "_unsafe_view", "reshape", "_reshape_alias", "expand"):
        inner = source.shape[at + 1 :].numel()
        for d in range(result.dim()):  # channels may be split, for example into experts or heads
            if result.shape[d] and source.shape[at] % result.shape[d] == 0 and result.shape[d + 1 :].numel() == inner:
                return d - result.dim()
        return None
    if name == "unsqueeze":
        position = args[1] % (rank + 1)
        return channels if position <= at else channels - 1
    if name in ("squeeze", "select", "unbind"):
        if len(args) < 2 or not isinstance(args[1], int):
            return channels if at == rank - 1 and result.dim() and result.shape[-1] == source.shape[-1] else None
        gone = args[1] % rank
        return None if gone == at else (channels if gone < at else channels + 1)
    if result.dim() == rank:
        return channels
    return -1 if channels == -1 and result.dim() and result.shape[-1] == source.shape[-1] else None


def _examine(name: str, frame: FrameType, owner: nn.Module, outer: nn.Module | None) -> Seen:
    """Describe a place and what is called there."""
    seen = Seen(name, owner, frame.f_code, frame.f_lasti, outer)
    try:
        method, node = calls.find(type(owner), frame.f_code, frame.f_lasti)
    except Exception as error:  # the source may be anything
        seen.problem = str(error) or type(error).__name__
        # A function that was given to the class under another name is not found, but may call one that the owner holds.
        held = [key for key in frame.f_code.co_names if callable(vars(owner).get(key))]
        if len(held) == 1 and _is_called(vars(owner)[held[0]], name, frame):
            seen.slot = held[0]
        return seen
    seen.label = ast.unparse(node.func).rpartition(".")[2] if isinstance(node.func, ast.Attribute) else name
    target = node.func
    if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name):
        of_owner = frame.f_locals.get(target.value.id) is owner and not hasattr(type(owner), target.attr)
        seen.slot = target.attr if of_owner else None
    try:
        seen.call = method.recipe(node, calls.argument(node))
        seen.function = expressions.function_of(node, frame, method.tree)
    except Exception as error:  # the expression may do anything outside its method
        seen.problem = f"{ast.unparse(node)} cannot be evaluated on its own: {error}"
    if name in _PARTS and seen.slot is None and (found := expressions.around(method.tree, node, frame)) is not None:
        whole, tensor, seen.function = found
        seen.call, seen.problem = method.recipe(whole, tensor), ""
        seen.label = seen.call.source
    return seen


def _is_called(function: Any, name: str, frame: FrameType) -> bool:
    """Return whether a function is what a frame calls: it runs now, or, if it is built in, has the operation's name."""
    function = getattr(function, "func", function)  # of a partial
    if not hasattr(function, "__code__"):
        return getattr(function, "__name__", "") == name
    inner = sys._getframe()
    while inner.f_back is not None and inner.f_back is not frame:
        inner = inner.f_back
    return inner.f_code is function.__code__


def why_not(places: list[Seen]) -> str:
    """Say why this is not an activation of a feed-forward part; "" if it is one in at least one of its calls."""
    calls_seen = [pair for place in places for pair in zip(place.inputs, place.outputs, strict=True)]
    reasons = [_why_not(source, result) for source, result in calls_seen]
    return "" if "" in reasons else reasons[0]


def _why_not(source: _Node, result: _Node) -> str:
    if source.origin in ("input", "weight"):
        return "its input does not come from a linear layer"
    if source.origin != "linear":
        return f"its input comes from {source.origin}, not from a linear layer"
    return _leads_astray(result)


def _leads_astray(node: _Node) -> str:
    """Say why the output of an activation does not go only into linear layers; "" if it goes only into those."""
    ahead, known, arrived = [node], {id(node)}, False
    while ahead:
        node = ahead.pop()
        for name, result, foreign in node.users:
            if result.fresh:
                arrived = True
            elif name == "cat" or (name == "view" and node.origin == result.origin):  # its channels stay apart
                if id(result) not in known:
                    known.add(id(result))
                    ahead.append(result)
            elif result.origin not in ("linear", "input"):
                return (
                    f"{name} combines its output with that of {foreign}" if foreign else f"its output goes into {name}"
                )
            elif id(result) not in known:
                known.add(id(result))
                ahead.append(result)
    return "" if arrived else "no linear layer follows it"


def channel_dim(places: list[Seen]) -> tuple[int, int] | None:
    """Return (dimension, number) of the channels, or None if unknown or unsupported by rational functions."""
    found = set()
    for seen in places:
        for node, shape in zip(seen.inputs, seen.shapes, strict=True):
            channels, rank = node.channels, len(shape)
            if channels == -1 and rank:
                found.add((-1, shape[-1]))
            elif channels is not None and channels == 1 - rank:
                found.add((1, shape[1]))
            else:
                return None
    return found.pop() if len(found) == 1 else None
