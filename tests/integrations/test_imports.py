"""An action at the end of an import: once, whoever imports and however, and nothing else is any different."""

import copy
import importlib
import inspect
import pickle
import sys
import threading
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import SourceFileLoader
from importlib.util import spec_from_file_location, spec_from_loader

import pytest

from grkan.integrations import imports
from grkan.integrations.imports import put_around, when_imported

MODELS = """
import sys
import time
time.sleep({seconds})
if {broken}:
    raise RuntimeError("zoo is broken")
loader_while_executed = __spec__.loader, __loader__
class Model:
    pass
make = Model
"""


@pytest.fixture
def write_zoo(tmp_path, monkeypatch):
    """Writes the package zoo, which takes `make` from zoo.models, as timm does create_model."""
    (tmp_path / "zoo").mkdir()
    (tmp_path / "zoo" / "__init__.py").write_text("from .models import make\n")
    monkeypatch.syspath_prepend(tmp_path)
    before = sys.meta_path
    monkeypatch.setattr(sys, "meta_path", [finder for finder in before if finder is not imports._finder])
    monkeypatch.setattr(imports, "_waiting", {})

    def write(seconds=0, broken=False):
        (tmp_path / "zoo" / "models.py").write_text(MODELS.format(seconds=seconds, broken=broken))
        importlib.invalidate_caches()
        return tmp_path / "zoo" / "models.py"

    write()
    yield write
    for name in [name for name in sys.modules if name.partition(".")[0] == "zoo"]:
        del sys.modules[name]


@pytest.fixture
def calls():
    return []


def import_package():
    import zoo

    return zoo.models


def import_module():
    import zoo.models

    return zoo.models


def import_name():
    from zoo.models import make

    return sys.modules[make.__module__]


def import_by_function():
    return importlib.import_module("zoo.models")


@pytest.mark.parametrize("how", [import_package, import_module, import_name, import_by_function])
def test_called_once_when_the_module_is_complete(write_zoo, calls, how):
    when_imported("zoo.models", lambda module: calls.append((module, module.make, hasattr(sys.modules["zoo"], "make"))))
    assert calls == []
    assert "zoo" not in sys.modules
    module = how()
    assert calls == [(module, module.make, False)]
    how()
    assert len(calls) == 1


def test_called_now_for_a_module_that_is_there(write_zoo, calls):
    import zoo.models

    when_imported("zoo.models", calls.append)
    assert calls == [zoo.models]
    assert imports._finder not in sys.meta_path


def test_an_action_may_import_the_module(write_zoo, calls):
    when_imported("zoo.models", lambda _: calls.append(import_name()))
    import zoo.models

    assert calls == [zoo.models]


def test_the_module_keeps_no_trace(write_zoo, calls):
    path = write_zoo()
    when_imported("zoo.models", calls.append)
    import zoo.models

    loaders = (zoo.models.__loader__, zoo.models.__spec__.loader)
    assert [type(loader) for loader in loaders] == [SourceFileLoader] * 2
    assert zoo.models.loader_while_executed == loaders
    assert inspect.getsource(zoo.models) == path.read_text()
    assert type(pickle.loads(pickle.dumps(zoo.models.Model()))) is zoo.models.Model
    assert zoo.models.__spec__ == importlib.util.find_spec("zoo.models")
    importlib.reload(zoo.models)
    importlib.reload(zoo)
    assert len(calls) == 1


def test_the_finder_is_gone_when_nothing_waits(write_zoo, calls):
    others = [*sys.meta_path]
    when_imported("zoo.models", calls.append)
    when_imported("zoo.models", calls.append)
    when_imported("zoo.layers", calls.append)
    assert sys.meta_path == [imports._finder, *others]
    import zoo.models

    assert calls == [zoo.models] * 2
    assert imports._finder in sys.meta_path
    write_zoo().with_name("layers.py").touch()
    waiting = sys.meta_path
    import zoo.layers

    assert len(calls) == 3
    assert sys.meta_path == others
    assert waiting == [imports._finder, *others]  # another thread may be going through it


def test_a_module_that_is_missing_or_fails(write_zoo, calls):
    when_imported("zoo.models", calls.append)
    when_imported("zoo.none", calls.append)
    write_zoo(broken=True)
    with pytest.raises(RuntimeError, match="zoo is broken"):
        import_package()
    assert calls == []
    path = write_zoo()
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'zoo\.none'"):
        importlib.import_module("zoo.none")
    assert calls == [sys.modules["zoo.models"]]
    path.with_name("none.py").touch()
    importlib.invalidate_caches()
    module = importlib.import_module("zoo.none")
    assert calls[1:] == [module]


def test_a_module_whose_import_is_forbidden(write_zoo, calls, monkeypatch):
    monkeypatch.setitem(sys.modules, "zoo.models", None)
    when_imported("zoo.models", calls.append)
    with pytest.raises(ModuleNotFoundError):
        import_package()
    assert calls == []


def test_an_action_that_fails_warns(write_zoo, calls):
    def fail(_):
        raise AttributeError("module 'zoo' has no attribute 'lions'")

    when_imported("zoo.models", fail)
    when_imported("zoo.models", calls.append)
    with pytest.warns(RuntimeWarning, match="grkan does not work with this version of zoo: AttributeError: module"):
        module = import_package()
    assert calls == [module]


def test_looking_for_the_module_imports_nothing(write_zoo, calls):
    path = write_zoo()
    sys.modules["zoo"] = module = type(sys)("zoo")
    module.__path__ = [str(path.parent)]
    when_imported("zoo.models", calls.append)
    spec = importlib.util.find_spec("zoo.models")
    assert calls == []
    assert spec.loader.get_source("zoo.models") == path.read_text()
    assert copy.deepcopy(spec).origin == str(path)
    assert not hasattr(spec.loader, "no_such_method")
    importlib.import_module("zoo.models")
    assert len(calls) == 1


class AskingOthers(MetaPathFinder):
    """As other libraries' import hooks are: asks all finders, wraps the loader."""

    def __init__(self):
        self.asking, self.loaded = False, []

    def find_spec(self, name, path=None, target=None):
        if self.asking or name != "zoo.models":
            return None
        self.asking = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.asking = False
        spec.loader = Recording(spec.loader, self.loaded)
        return spec


class AskingAllButItself(AskingOthers):
    def find_spec(self, name, path=None, target=None):
        if name != "zoo.models":
            return None
        specs = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next(spec for spec in specs if spec is not None)
        spec.loader = Recording(spec.loader, self.loaded)
        return spec


class Recording(Loader):
    def __init__(self, loader, loaded):
        self.loader, self.loaded = loader, loaded

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module):
        self.loader.exec_module(module)
        self.loaded.append(module)


class Providing(MetaPathFinder):
    """Has a module that is in no folder."""

    def find_spec(self, name, path=None, target=None):
        return spec_from_loader(name, Recording(self, [])) if name == "zoo.models" else None

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        module.make = "provided"


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", [AskingOthers, AskingAllButItself, Providing])
def test_other_finders_are_heard(write_zoo, calls, kind, when):
    other = kind()
    if when == "before":
        sys.meta_path.insert(0, other)
    when_imported("zoo.models", calls.append)
    if when == "after":
        sys.meta_path.insert(0, other)
    import zoo.models

    if kind is Providing and when == "after":  # it stands in front and asks nobody: so its module comes unseen
        assert zoo.models.make == "provided"
        return
    assert calls == [zoo.models]
    if kind is Providing:
        assert zoo.models.make == "provided"
    else:
        assert other.loaded == [zoo.models]
    assert other in sys.meta_path


def test_a_lazy_loader(write_zoo, calls):
    path = write_zoo()
    when_imported("lazy_zoo", calls.append)
    spec = spec_from_file_location("lazy_zoo", path)
    finder = type("Finder", (), {"find_spec": staticmethod(lambda name, *_: spec if name == "lazy_zoo" else None)})
    sys.meta_path.insert(1, finder)
    spec.loader = importlib.util.LazyLoader(spec.loader)
    module = importlib.import_module("lazy_zoo")
    try:
        assert module.make.__name__ == "Model"
        assert calls == [module]
    finally:
        del sys.modules["lazy_zoo"]


def test_threads(write_zoo, calls):
    """Whether it is registered before, while or after other threads import: the action comes once, and to all."""
    write_zoo(seconds=0.05)
    seen = []

    def register():
        when_imported("zoo.models", calls.append)
        seen.append(import_by_function())

    threads = [threading.Thread(target=import_by_function if i % 2 else register) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads)
    assert seen == [sys.modules["zoo.models"]] * 8
    assert calls == [sys.modules["zoo.models"]] * 8
    assert imports._finder not in sys.meta_path


def test_a_module_that_another_thread_is_importing_is_waited_for(write_zoo, calls):
    write_zoo(seconds=0.2)
    thread = threading.Thread(target=import_by_function)
    thread.start()
    while "zoo.models" not in sys.modules:
        pass
    when_imported("zoo.models", lambda module: calls.append(hasattr(module, "make")))
    assert calls == [True]
    thread.join()


def test_a_wrapper_is_put_around_a_function_once():
    class Owner:
        def method(self, x):
            """Its own."""
            return x

        @classmethod
        def of_the_class(cls, x):
            return cls, x

    function = Owner.method
    for _ in range(2):
        put_around(Owner, "method", lambda method: lambda self, x: method(self, x) + 1)
        put_around(Owner, "of_the_class", lambda method: lambda cls, x: (*method(cls, x), "more"))
    assert Owner().method(1) == 2
    assert Owner.of_the_class(1) == (Owner, 1, "more")
    assert (Owner.method.__doc__, Owner.method.__wrapped__) == ("Its own.", function)
