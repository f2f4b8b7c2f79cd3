"""Turn a function that `forward` calls into a child of the module: `F.gelu(x)` becomes `self.act(x)`.

A function call cannot be replaced from outside, as a child can. So the module gets a child, and a class whose method
calls that child. The class is a subclass of the module's own, under the same name. Its method is compiled from the same
source, with only this expression changed. So torch.compile, exporters and activation checkpointing see plain code, and
copies and pickles of the module keep it.
"""

import __future__

import ast
import copy
import copyreg
import inspect
import linecache
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from types import CellType, CodeType, FunctionType
from typing import Any, TypeAlias

from torch import nn

from ..errors import GrkanValueError

_Calls: TypeAlias = "tuple[tuple[CallRecipe, str], ...]"
"""Changed calls, each with the name of the child that is called instead."""

_Texts: TypeAlias = tuple[tuple[str, str], ...]
"""Methods, each with its changed source."""

_set_class: Any = vars(object)["__class__"].__set__

_FUTURE = 0
for _name in __future__.all_feature_names:
    _FUTURE |= getattr(__future__, _name).compiler_flag


@dataclass(frozen=True)
class CallRecipe:
    """An expression in the source of a method that is a function of one tensor."""

    method: str
    """The method's name, mostly "forward"."""
    source: str
    """The expression, as `ast.unparse` writes it: "F.gelu(self.fc1(x))"."""
    argument: str
    """The tensor in the expression: "self.fc1(x)"."""
    index: int
    """The position among the expressions with the same source; 0 is the first."""


@dataclass(frozen=True)
class _Method:
    """A method of a class, and its source."""

    function: FunctionType
    tree: ast.FunctionDef
    first_line: int
    """The offset from lines of `tree` to lines of the file."""

    def expressions(self) -> list[ast.expr]:
        """Return all expressions that may be a function, in source order."""
        found = [node for node in ast.walk(self.tree) if isinstance(node, (ast.Call, ast.BinOp, ast.UnaryOp))]
        return sorted(found, key=lambda node: (node.lineno, node.col_offset, -(node.end_col_offset or 0)))

    def recipe(self, node: ast.expr, tensor: ast.expr) -> CallRecipe:
        """Describe an expression of the method as data."""
        source = ast.unparse(node)
        same = [other for other in self.expressions() if ast.unparse(other) == source]
        return CallRecipe(self.function.__name__, source, ast.unparse(tensor), same.index(node))


def find(kind: type, code: CodeType, offset: int) -> tuple[_Method, ast.Call]:
    """Return the method, and its call at an instruction of its code.

    Raises:
        ValueError: the call there cannot be changed; the message says why.
    """
    method = _method(kind, _name_of(kind, code))
    if code not in _codes(method.function.__code__):
        raise GrkanValueError(f"{code.co_name} is called through super()")
    calls = [node for node in method.expressions() if isinstance(node, ast.Call)]
    if sys.version_info >= (3, 11):
        where = next(p for i, p in enumerate(code.co_positions()) if i == offset // 2)
        first = method.first_line
        places = [(c.lineno + first, (c.end_lineno or 0) + first, c.col_offset, c.end_col_offset) for c in calls]
        wanted = [call for call, place in zip(calls, places, strict=True) if place == where]
    else:
        wanted = _at_offset(method, calls, code, offset)
    if len(wanted) != 1:
        raise GrkanValueError(f"the source of {code.co_name} does not show which call it is")
    return method, wanted[0]


def _at_offset(method: _Method, calls: list[ast.Call], code: CodeType, offset: int) -> list[ast.Call]:
    """Find the call at an instruction in Python 3.10, which records only lines, by giving each call its own line."""
    wrapped = _wrapped(method)
    copies = [node for node in ast.walk(wrapped) if isinstance(node, ast.Call)]
    places = [(node.lineno, node.col_offset, node.end_col_offset) for node in copies]
    for number, node in enumerate(copies, 10_000):
        for part in (node, node.func):
            part.lineno = part.end_lineno = number
    whole = _inside(compile(wrapped, "<grkan>", "exec", flags=code.co_flags & _FUTURE, dont_inherit=True))
    compiled = _codes(whole)[_codes(method.function.__code__).index(code)]
    if compiled.co_code != code.co_code:
        return []
    line = next((line for start, end, line in compiled.co_lines() if start <= offset < end), None)
    wanted = dict(enumerate(places, 10_000)).get(line or 0)
    return [call for call in calls if (call.lineno, call.col_offset, call.end_col_offset) == wanted]


def check(kind: type, call: CallRecipe) -> None:
    """Check that the expression exists and can be changed.

    Raises:
        ValueError: it does not exist, or cannot be changed.
    """
    _class_with(_origin(kind)[0], ((call, "act"),))


def lift(module: nn.Module, call: CallRecipe, name: str, child: nn.Module, undo: ExitStack) -> None:
    """Make a module call a new child instead of a function; `undo` reverts it.

    Raises:
        ValueError: this is not possible.
    """
    kind = type(module)
    base, others = _origin(kind)
    if "forward" in vars(module):
        raise GrkanValueError("its forward has been replaced, as Accelerate's hooks do")
    if hasattr(module, name):
        raise GrkanValueError(f"it already has an attribute named {name}")
    module.__class__ = _class_with(base, (*others, (call, name)))
    undo.callback(_set_class, module, kind)
    module.add_module(name, child)
    undo.callback(module._modules.pop, name)


def _origin(kind: type) -> tuple[type, _Calls]:
    """Return the original class, before any call was changed, and the changes."""
    return vars(kind).get("_grkan_calls", (kind, ()))


def _calls_of(kind: type) -> _Calls:
    """Return the changed calls of a class and its bases."""
    return tuple(chain.from_iterable(_origin(base)[1] for base in reversed(kind.__mro__)))


_classes: dict[tuple[type, _Calls], type] = {}


def _class_with(base: type, calls: _Calls, texts: _Texts = ()) -> type:
    """Return the class with changed calls. `texts` are used for methods whose own source is not at hand."""
    if (base, calls) in _classes:
        return _classes[base, calls]
    own = base.__reduce_ex__ not in (object.__reduce_ex__, _Changed.__reduce_ex__)
    if own or base.__reduce__ is not object.__reduce__:
        raise GrkanValueError(f"{base.__name__} defines its own pickling")
    names = dict.fromkeys(call.method for call, _ in calls)
    found = {name: _text(base, name, [(c, child) for c, child in calls if c.method == name], texts) for name in names}
    members: dict[str, Any] = {
        "__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__,
        "_grkan_calls": (base, calls), "_grkan_texts": tuple(found.items()),
    }  # fmt: skip
    members.update((name, _rewritten(base, name, text)) for name, text in found.items())
    return _classes.setdefault((base, calls), type(base)(base.__name__, (base, _Changed), members))


def _change_class(self: Any, kind: Any) -> None:
    """Set `__class__` of a module. The changed calls stay: the module has no other use for its functions.

    A tool that knows a class by its name alone, such as dill, takes the original one for the changed one.

    Raises:
        ValueError: the new class has no such calls.
    """
    if isinstance(kind, type):
        base, calls = _origin(kind)
        there = _calls_of(kind)
        lost = tuple(call for call in _calls_of(type(self)) if call not in there)
        try:
            kind = _class_with(base, (*calls, *lost)) if lost else kind
        except GrkanValueError as error:
            raise GrkanValueError(
                f"__class__ must be a class with {', '.join(call.source for call, _ in lost)}, in place of which the "
                f"converted {type(self).__name__} calls a child; got {kind.__name__}: {error}"
            ) from error
    _set_class(self, kind)


class _Changed:
    """A base of all classes with changed calls. Tools that pickle a class by value take this one by its name."""

    __slots__ = ()
    __class__ = property(type, _change_class)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle the module with its original class and the changed calls."""
        kind = type(self)
        reduced: Any = object.__reduce_ex__(self, max(2, protocol))
        if "_grkan_calls" not in vars(kind):  # a subclass, which is pickled as any other class
            return reduced
        function, arguments, *rest = reduced
        assert function is copyreg.__newobj__  # type: ignore[attr-defined]
        return (_new, (*_origin(kind), arguments[1:], vars(kind)["_grkan_texts"]), *rest)


def _new(base: type, calls: _Calls, arguments: tuple[Any, ...], texts: _Texts = ()) -> Any:
    kind: Any = _class_with(base, calls, texts)
    return kind.__new__(kind, *arguments)


def _text(base: type, name: str, calls: list[tuple[CallRecipe, str]], texts: _Texts) -> str:
    """Return the source of the method with the calls changed."""
    try:
        method = _method(base, name)
    except GrkanValueError:
        # Tools can unpickle a class whose source is missing, or belongs to another class: that of a script or a cell.
        if name in dict(texts):
            return dict(texts)[name]
        raise
    changes: dict[ast.expr, tuple[str, ast.expr]] = {}
    for call, child in calls:
        same = [node for node in method.expressions() if ast.unparse(node) == call.source]
        if call.index >= len(same):
            raise GrkanValueError(f"its {name} does not contain {call.source}")
        node = same[call.index]
        inside = (part for part in ast.walk(node) if isinstance(part, ast.expr) and part is not node)
        tensor = next((part for part in inside if ast.unparse(part) == call.argument), None)
        if tensor is None:
            raise GrkanValueError(f"{call.source} does not contain {call.argument}")
        changes[node] = child, tensor
    positional = [*method.tree.args.posonlyargs, *method.tree.args.args]
    if not positional:
        raise GrkanValueError(f"its {name} has no argument for the module itself")
    _Rewriter(changes, positional[0].arg).visit(method.tree)
    return ast.unparse(_wrapped(method))


def _rewritten(base: type, name: str, text: str) -> Any:
    """Return the method with another source."""
    attribute, function = _attribute(base, name)
    filename = f"<grkan {base.__module__}.{base.__qualname__}.{name} {len(linecache.cache)}>"
    return _around(attribute, function, _with_code(function, _compile(text, function, filename)))


class _Rewriter(ast.NodeTransformer):
    def __init__(self, changes: dict[ast.expr, tuple[str, ast.expr]], module: str) -> None:
        self.changes, self.module = changes, module

    def visit(self, node: ast.AST) -> Any:
        if isinstance(node, ast.Expr) and node.value in self.changes:
            raise GrkanValueError(f"{ast.unparse(node)} works in place")
        if not isinstance(node, ast.expr) or node not in self.changes:
            return self.generic_visit(node)
        child, tensor = self.changes[node]
        function = ast.Attribute(ast.Name(self.module, ast.Load()), child, ast.Load())
        return ast.copy_location(ast.Call(function, [self.visit(tensor)], []), node)


def argument(call: ast.Call) -> ast.expr:
    """Return the tensor that a call is applied to: its first argument, or the object whose method it calls.

    Raises:
        ValueError: the tensor cannot be determined.
    """
    if call.args and not isinstance(call.args[0], ast.Starred):
        return call.args[0]
    if not call.args and call.keywords and call.keywords[0].arg is not None:
        return call.keywords[0].value
    if not call.args and not call.keywords and isinstance(call.func, ast.Attribute):
        return call.func.value
    raise GrkanValueError(f"it is unclear which argument of {ast.unparse(call)} is the tensor")


def _attribute(kind: type, name: str) -> tuple[Any, FunctionType]:
    """Return the attribute of the class: the function, or the wrapper of a decorator around it; and the function."""
    attribute = next((vars(k)[name] for k in kind.__mro__ if name in vars(k)), None)
    function = next((f for f in _inner(attribute) if f.__code__.co_name == name), None)
    if function is None:
        raise GrkanValueError(f"its {name} is not a method written in Python")
    return attribute, function


def _method(kind: type, name: str) -> _Method:
    _, function = _attribute(kind, name)
    found = _Method(function, *_parsed(function.__code__))
    if _outline(_compile(ast.unparse(_wrapped(found)), function, "<grkan>")) != _outline(function.__code__):
        raise GrkanValueError(f"the source of {name} differs from the code that runs")
    return found


def _outline(code: CodeType) -> tuple[Any, ...]:
    """Return the parts of the code that depend on the source alone; instructions also depend on imports around it."""
    # In Python 3.10 the qualified names of inner functions are constants, which begin with the enclosing names.
    constants = {repr(c) for c in code.co_consts if not isinstance(c, CodeType) and ".<locals>." not in str(c)}
    return code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars, constants


def _parsed(code: CodeType) -> tuple[ast.FunctionDef, int]:
    """Return the syntax tree of a method, and the offset from its lines to lines of the file."""
    try:
        lines, _ = inspect.getsourcelines(code)
        tree = ast.parse("if True:\n" + "".join(lines) if lines[0][:1].isspace() else "\n" + "".join(lines))
    except (OSError, SyntaxError, TypeError, IndexError) as error:
        raise GrkanValueError(f"the source of {code.co_name} is not available") from error
    node: Any = tree.body[0]
    node = node.body[0] if isinstance(node, ast.If) else node
    if not isinstance(node, ast.FunctionDef):
        raise GrkanValueError(f"{code.co_name} is not a plain method")
    return node, code.co_firstlineno - 2


def _name_of(kind: type, code: CodeType) -> str:
    """Return the name of the method that some code belongs to."""
    # PyTorch's own methods call no activation, and other libraries may have replaced them.
    own = [k for k in kind.__mro__ if k not in (nn.Module, object)]
    for member in dict.fromkeys(name for k in own for name in vars(k)):
        attribute = next(vars(k)[member] for k in kind.__mro__ if member in vars(k))
        for function in _inner(attribute):
            if function.__code__.co_name == member and code in _codes(function.__code__):
                return member
    raise GrkanValueError(f"{code.co_name} is not one of its methods, or is called through super()")


def _inner(attribute: Any, known: tuple[Any, ...] = ()) -> Iterator[FunctionType]:
    """Yield a function, and the functions in its closure, which a decorator may have wrapped."""
    if isinstance(attribute, FunctionType) and attribute not in known:  # a function may call itself
        yield attribute
        for cell in attribute.__closure__ or ():
            yield from _inner(_content(cell), (*known, attribute))


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return None


def _codes(code: CodeType) -> list[CodeType]:
    """Return a function's code, and that of the functions defined inside it."""
    inner = [_codes(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return [code, *chain.from_iterable(inner)]


def _compile(text: str, function: FunctionType, filename: str) -> CodeType:
    """Compile a method's source, as `_wrapped` makes it, so that names mean what they mean in the original method."""
    # For tracebacks and TorchScript, which read the source.
    linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
    flags = function.__code__.co_flags & _FUTURE
    return _inside(compile(text, filename, "exec", flags=flags, dont_inherit=True))


def _wrapped(method: _Method) -> ast.Module:
    """Return a copy of a method's tree, inside a class inside a function."""
    function, tree = method.function, copy.deepcopy(method.tree)
    tree.decorator_list, tree.returns = [], None
    arguments = tree.args
    for one in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg):
        if one is not None:
            one.annotation = None
    # The actual default values are copied from the function later.
    arguments.defaults = [ast.copy_location(ast.Constant(None), value) for value in arguments.defaults]
    arguments.kw_defaults = [value and ast.copy_location(ast.Constant(None), value) for value in arguments.kw_defaults]
    # The class is for names with two leading underscores, the function for the variables of enclosing functions.
    owner = (function.__qualname__.split(".")[-2:-1] or ["_"])[0]
    outer = ", ".join(name for name in function.__code__.co_freevars if name != "__class__")
    wrapped = ast.parse(f"def outer({outer}):\n class {owner if owner.isidentifier() else '_'}:\n  pass")
    wrapped.body[0].body[0].body = [tree]  # type: ignore[attr-defined]
    return wrapped


def _inside(code: CodeType) -> CodeType:
    for _ in range(3):
        code = next(constant for constant in code.co_consts if isinstance(constant, CodeType))
    return code


def _with_code(function: FunctionType, code: CodeType) -> FunctionType:
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    return _copy(function, code, tuple(cells[name] for name in code.co_freevars))


def _copy(function: FunctionType, code: CodeType, closure: tuple[CellType, ...]) -> FunctionType:
    new = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, closure)
    for name in ("__kwdefaults__", "__annotations__", "__qualname__", "__module__", "__doc__"):
        setattr(new, name, getattr(function, name))
    vars(new).update(vars(function))
    return new


def _around(attribute: Any, old: FunctionType, new: FunctionType, outer: tuple[Any, ...] = ()) -> Any:
    """Wrap the new function as decorators wrapped the old one."""
    if attribute is old:
        return new
    if attribute in outer:
        raise GrkanValueError(f"a decorator of {old.__name__} calls itself")
    cells, outer = attribute.__closure__, (*outer, attribute)
    changed = tuple(
        CellType(_around(f, old, new, outer))
        if isinstance(f := _content(cell), FunctionType) and old in _inner(f)
        else cell
        for cell in cells
    )
    wrapper = _copy(attribute, attribute.__code__, changed)
    if vars(wrapper).get("__wrapped__") is old:
        wrapper.__wrapped__ = new  # type: ignore[attr-defined]
    return wrapper
