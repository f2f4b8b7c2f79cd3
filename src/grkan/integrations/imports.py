"""Run an action when a module is imported, without importing it.

A finder in front of all others waits for the modules. The other finders find them and their loaders load them; then it
calls the actions. It removes itself when nothing is waiting, and loaded modules keep no trace of it.
"""

import functools
import importlib
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_waiting: dict[str, list[Callable[[ModuleType], object]]] = {}
_changing = threading.Lock()


def when_imported(name: str, action: Callable[[ModuleType], object]) -> None:
    """Call action(module) once, when the import of the named module ends, or now if it is imported already.

    Names that its package imports from it later, such as `timm.create_model`, do not exist yet. An action that fails
    only warns, so as not to break the import of a module that works without grkan.
    """
    with _changing:
        _waiting.setdefault(name, []).append(action)
        if _finder not in sys.meta_path:
            sys.meta_path.insert(0, _finder)
    if sys.modules.get(name) is not None:  # checked last, so that an import in another thread is not missed
        _act(importlib.import_module(name))  # waits for the other thread


def put_around(owner: Any, name: str, wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace a function of a module, or a method of a class, by wrapper(function). Repeated calls do nothing.

    A function is also replaced in the modules that have imported it.
    """
    found = vars(owner)[name]
    function = found.__func__ if isinstance(found, classmethod) else found
    if not hasattr(function, "_put_around_by_grkan"):
        new: Any = functools.wraps(function)(wrapper(function))
        new._put_around_by_grkan = True
        setattr(owner, name, classmethod(new) if isinstance(found, classmethod) else new)
        if isinstance(owner, ModuleType):
            for module in list(sys.modules.values()):
                if getattr(module, "__dict__", {}).get(name) is function:
                    setattr(module, name, new)


class _Finder(MetaPathFinder):
    def __init__(self) -> None:
        self.local = threading.local()

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in _waiting or getattr(self.local, "searching", False):
            return None
        self.local.searching = True  # another finder like this may ask all finders, this one included
        try:
            spec = self.find_spec_behind(name, path, target)
        finally:
            self.local.searching = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec

    def find_spec_behind(self, name: str, path: Sequence[str] | None, target: ModuleType | None) -> ModuleSpec | None:
        finders = iter([*sys.meta_path])
        for finder in finders:
            if finder is self:
                break
        for finder in finders:  # the finders in front have been asked already
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                return spec
        return None


class _Loader(Loader):
    """A stand-in for another loader: it lets that one load the module, then runs the actions."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self).get("loader"), name)  # during a copy there is no loader yet

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        _act(module)


_finder = _Finder()


def _act(module: ModuleType) -> None:
    name = module.__name__
    with _changing:
        actions = _waiting.pop(name, [])
        if not _waiting:
            # Make a new list: a thread that iterates over the old one would skip the next finder.
            sys.meta_path = [finder for finder in sys.meta_path if finder is not _finder]
    for action in actions:
        try:
            action(module)
        except Exception as error:
            warnings.warn(
                f"grkan does not work with this version of {name.partition('.')[0]}: {type(error).__name__}: {error}",
                RuntimeWarning,
                stacklevel=2,
            )
