"""A wrong argument is told as one, and anything else that fails keeps its own error."""

import pytest
import timm
import torch

from grkan.errors import GrkanImportError
from grkan.models.build import WrongArgumentsError, build_model
from grkan.models.kat import KAT

NAME = "kat_micro_patch2_8"


def test_it_is_built_on_the_cpu_whatever_the_default_is():
    with torch.device("meta"):
        model = build_model(NAME, {"num_classes": 3, "depth": 1})
    assert type(model) is KAT
    assert model.num_classes == 3
    assert {p.device.type for p in model.parameters()} == {"cpu"}


@pytest.mark.parametrize(
    ("name", "arguments", "match"),
    [
        (NAME, {"num_grups": 4}, "^TypeError: .*unexpected keyword argument 'num_grups'$"),
        (NAME, {"num_groups": 7}, "^in_features must be divisible by num_groups, 7; got 96$"),
        (NAME, {"num_groups": "8"}, "^num_groups must"),
        (NAME, {"num_heads": 0}, "^ZeroDivisionError: "),
        (NAME, {"num_heads": 5}, "^AssertionError: "),
        (NAME, {"norm_layer": "none"}, "^KeyError: 'none'$"),
        ("resnet18", {"in_chans": -3}, "^RuntimeError: .*negative"),
    ],
)
def test_a_wrong_argument(name, arguments, match):
    with pytest.raises(WrongArgumentsError, match=match) as caught:
        build_model(name, arguments)
    assert caught.value.__cause__ is not None
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("arguments", [{}, {"num_classes": 3}])
def test_a_failure_of_the_machine_is_not_the_arguments(monkeypatch, arguments):
    """Such as an illegal memory access of a kernel that ran before, or no memory: where nothing runs, nothing fails."""
    create = timm.create_model

    def fail(*args, **kwargs):
        if torch.get_default_device().type != "meta":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return create(*args, **kwargs)

    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(RuntimeError, match="an illegal memory access"):
        build_model(NAME, arguments)


@pytest.mark.parametrize("right", [None, {"depth": 1}])
def test_a_bug_is_not_the_arguments(monkeypatch, right):
    def fail(self):
        self.no_such_attribute  # noqa: B018

    monkeypatch.setattr(KAT, "init_weights", fail)
    monkeypatch.setattr(KAT, "__init__", lambda self, **_: fail(self))
    with pytest.raises(AttributeError, match="no_such_attribute"):
        build_model(NAME, {"num_classes": 3}, right)


def test_a_missing_package_is_not_the_arguments(monkeypatch):
    def fail(self, num_classes=10, **_):
        if num_classes == 3:
            raise GrkanImportError("it needs scipy")

    monkeypatch.setattr(KAT, "__init__", fail)
    with pytest.raises(ImportError, match="needs scipy"):
        build_model(NAME, {"num_classes": 3})


def test_wrong_beside_arguments_that_are_right():
    right = {"embed_dim": 48, "num_groups": 4}
    with pytest.raises(WrongArgumentsError, match="unexpected keyword argument 'heads'"):
        build_model(NAME, {**right, "heads": 3}, right)
