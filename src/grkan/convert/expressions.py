"""Turn an expression in a running method into a function of its tensor, if no other part of it may change."""

import ast
from collections.abc import Callable, Iterator
from functools import partial
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, nn

from . import calls


def around(
    tree: ast.AST, node: ast.expr, frame: FrameType
) -> tuple[ast.expr, ast.expr, Callable[[Tensor], Any]] | None:
    """Return the largest expression around `node` that is a function of a variable, such as x * sigmoid(1.702 * x)."""
    parents: Any = {child: parent for parent in ast.walk(tree) for child in ast.iter_child_nodes(parent)}
    start, found = node, None
    while isinstance(node, (ast.Call, ast.BinOp, ast.UnaryOp)):
        names = {part.id: part for part in ast.walk(node) if isinstance(part, ast.Name)}
        tensors = [name for name in names if isinstance(frame.f_locals.get(name), Tensor)]
        called = [part.func for part in ast.walk(node) if isinstance(part, ast.Call)]
        if len(tensors) != 1 or not all(_is_of_torch(function, frame) for function in called):
            break
        if _varies(node, frame, tree, tensors[0]):
            break
        function = partial(_evaluate, _compiled(node), frame.f_globals, dict(frame.f_locals), tensors[0])
        if node is not start and _is_elementwise(function):
            found = node, names[tensors[0]], function
        node = parents[node]
        while isinstance(node, ast.Attribute):  # a method of it
            node = parents[node]
    return found


def _compiled(node: ast.expr) -> CodeType:
    return compile(ast.Expression(node), "<grkan>", "eval")


def _evaluate(code: CodeType, names: dict[str, Any], values: dict[str, Any], name: str, x: Tensor) -> Any:
    """Evaluate an expression with another value for one of its variables."""
    return eval(code, names, {**values, name: x})


def _is_elementwise(function: Callable[[Tensor], Any]) -> bool:
    x = torch.linspace(-2.0, 2.0, 5, dtype=torch.float64, device="cpu")
    try:
        y = function(x)
        return all(torch.allclose(function(x[i : i + 1]), y[i : i + 1]) for i in range(5)) and y.shape == x.shape
    except Exception:  # it needs tensors of another kind
        return False


def _is_of_torch(function: ast.expr, frame: FrameType) -> bool:
    """Return whether a function in an expression is PyTorch's, or a method of a tensor."""
    base: ast.expr = function
    while isinstance(base, ast.Attribute):
        base = base.value
    if not isinstance(base, ast.Name) or isinstance(frame.f_locals.get(base.id), Tensor):
        return True  # a method of a tensor, or of an expression that is checked as well
    value = eval(_compiled(function), frame.f_globals, frame.f_locals)
    of_torch = str(getattr(value, "__module__", None) or "torch").startswith(("torch", "math"))
    return of_torch and not isinstance(value, nn.Module)


def _varies(node: ast.AST, frame: FrameType, tree: ast.AST, *known: str) -> str:
    """Say why the value of an expression may differ from call to call; "" if it may not. `known`: other variables."""
    for part in ast.walk(node):
        if isinstance(part, ast.Attribute) and part.attr == "training":
            return "it does something else in training"
        if isinstance(part, ast.Name) and part.id not in known and _may_change(part.id, frame, tree, *known):
            return f"{part.id} may change from call to call"
        if isinstance(part, (ast.Attribute, ast.Subscript)) and _holds_tensor(part, frame):
            return f"{ast.unparse(part)} is a tensor of the model, which may change"
    return ""


def _holds_tensor(part: ast.expr, frame: FrameType) -> bool:
    """Return whether an attribute or an item of something that is no tensor is one, such as a learned factor."""
    root = part
    while isinstance(root, (ast.Attribute, ast.Subscript)):
        root = root.value
    if not isinstance(root, ast.Name) or isinstance(frame.f_locals.get(root.id), Tensor):
        return False
    try:
        return isinstance(eval(_compiled(part), frame.f_globals, frame.f_locals), Tensor)
    except Exception:  # an item of something else
        return False


# Calls whose results depend only on their arguments.
_SURE = ("getattr", "float", "int", "str", "bool", "partial")


def _may_change(name: str, frame: FrameType, tree: Any, *known: str) -> bool:
    """Return whether a variable in a method may have another value in another call, or in training.

    It may not if it is the module, no variable of the method, or bound once: to an import, or to an expression of names
    that do not change. An argument, the variable of a loop or the result of a call may be something else next time.
    """
    functions = [part.args for part in ast.walk(tree) if isinstance(part, (ast.FunctionDef, ast.Lambda))]
    if name in [argument.arg for argument in (*tree.args.posonlyargs, *tree.args.args)][:1]:
        return False
    for function in functions:
        given = (*function.posonlyargs, *function.args, *function.kwonlyargs, function.vararg, function.kwarg)
        if any(argument is not None and argument.arg == name for argument in given):
            return True
    bound = [value for node in ast.walk(tree) if node is not tree for n, value in _bound(node) if n == name]
    if not bound or (len(bound) == 1 and isinstance(bound[0], ast.alias)):
        return False
    if len(bound) > 1 or bound[0] is None:
        return True
    called = [ast.unparse(part.func).rpartition(".")[2] for part in ast.walk(bound[0]) if isinstance(part, ast.Call)]
    # Variables that are bound once, to each other, have no value when they are read.
    return not set(called) <= set(_SURE) or bool(_varies(bound[0], frame, tree, *known, name))


def _bound(node: ast.AST) -> Iterator[tuple[str, ast.AST | None]]:
    """Yield the names that a node binds, each with its import or its expression; None for anything else."""
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        yield from ((alias.asname or alias.name.partition(".")[0], alias) for alias in node.names)
        return
    if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.ExceptHandler)) and node.name:
        yield node.name, None
        return
    targets: list[Any] = []
    value: ast.AST | None = None
    if isinstance(node, ast.Assign):
        targets, value = node.targets, node.value
    elif isinstance(node, (ast.AnnAssign, ast.NamedExpr)):
        targets, value = [node.target], node.value
    elif isinstance(node, (ast.AugAssign, ast.For, ast.comprehension)):
        targets = [node.target]
    elif isinstance(node, ast.withitem):
        targets = [node.optional_vars] if node.optional_vars is not None else []
    elif isinstance(node, (ast.MatchAs, ast.MatchStar)) and node.name:
        yield node.name, None
    for target in targets:
        for part in ast.walk(target):
            if isinstance(part, ast.Name) and not isinstance(part.ctx, ast.Load):
                yield part.id, value


def function_of(call: ast.Call, frame: FrameType, tree: ast.AST) -> Callable[[Tensor], Any]:
    """Return a call as a function of its tensor; all other arguments keep their current values.

    Raises:
        ValueError: it depends on the mode, or on something that may have another value in another call.
    """

    def value(node: ast.expr) -> Any:
        for part in ast.walk(node):
            plain = (ast.Name, ast.Attribute, ast.Constant, ast.Subscript, ast.UnaryOp, ast.USub, ast.Load)
            if not isinstance(part, plain):
                raise ValueError(f"{ast.unparse(node)} is neither a name nor a number")
        if why := _varies(node, frame, tree):
            raise ValueError(why)
        return eval(_compiled(node), frame.f_globals, frame.f_locals)

    tensor = calls.argument(call)
    rest = [value(node) for node in call.args if node is not tensor]
    named = {str(k.arg): value(k.value) for k in call.keywords if k.value is not tensor}
    if isinstance(call.func, ast.Attribute) and (tensor is call.func.value or _is_tensor(call.func.value, frame)):
        method = getattr(Tensor, call.func.attr)
        if tensor is not call.func.value:
            raise ValueError(f"{ast.unparse(call)} takes another tensor as an argument")
        return lambda x: method(x, *rest, **named)
    function = value(call.func)
    keyword = next((str(k.arg) for k in call.keywords if k.value is tensor), None)
    if keyword is not None:
        return lambda x: function(**{keyword: x}, **named)
    return lambda x: function(x, *rest, **named)


def _is_tensor(node: ast.expr, frame: FrameType) -> bool:
    if not isinstance(node, ast.Name):
        return not isinstance(node, (ast.Attribute, ast.Subscript))
    return isinstance(frame.f_locals.get(node.id), Tensor)
