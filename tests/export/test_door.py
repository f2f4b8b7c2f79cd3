"""What `grkan.export` says to mistakes, before it does any work."""

import sys
from pathlib import Path

import pytest
import torch

import grkan
from grkan.export.job import outputs

pytest.importorskip("onnxruntime")


class Never(torch.nn.Module):
    def forward(self, x):
        raise AssertionError("the model was run")


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"format": "torchscript"}, ValueError, "format must be 'onnx' or 'openvino' or .* got 'torchscript'"),
        ({"format": None}, TypeError, "format must be"),
        ({"path": 3}, TypeError, "path must be a str or a pathlib.Path; got 3"),
        ({"path": "missing/model.onnx"}, FileNotFoundError, "there is no such folder"),
        ({"path": "."}, IsADirectoryError, "is a folder"),
        ({"dynamic": 1}, TypeError, "dynamic must be a bool; got 1"),
        ({"int8": "yes"}, TypeError, "int8 must be a bool"),
        ({"format": "pt2", "path": "m.pt2", "int8": True}, ValueError, "int8 is for format 'onnx'; got format 'pt2'"),
        ({"format": "pt2", "path": "m.pt2", "inline": True}, ValueError, "inline is for format 'onnx'"),
        ({"format": "pt2"}, ValueError, r"path must end in \.pt2 for format 'pt2'; got 'model.onnx'"),
        ({"format": "aoti"}, ValueError, r"path must end in \.pt2"),
        ({"model": "kat"}, TypeError, r"model must be a torch\.nn\.Module; got 'kat'"),
        ({}, ValueError, "example must be given"),
        ({"example": "x"}, TypeError, "example must be a Tensor, a tuple of arguments or a mapping"),
        ({"example": ()}, ValueError, "example must contain a tensor"),
        (
            {"model": torch.nn.Linear(3, 2), "example": torch.ones(2, 4)},
            ValueError,
            r"float32 \(2, 4\) it raises Runtime",
        ),
        ({"model": torch.nn.Linear(3, 2, device="meta")}, ValueError, "they are meta or fake tensors"),
    ],
)
def test_mistakes(arguments, kind, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(kind, match=message):
        grkan.export(**({"model": Never(), "path": "model.onnx"} | arguments))
    assert list(Path().iterdir()) == []


def test_a_folder_that_holds_something_is_not_replaced(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="already exists and is not an empty folder"):
        grkan.export(Never(), tmp_path, format="timm")
    assert (tmp_path / "file").read_text() == "mine"


def test_the_function_and_the_package_have_one_name():
    import grkan.export.job

    assert grkan.export.job is sys.modules["grkan.export.job"]
    with pytest.raises(TypeError, match="path must be a str"):
        grkan.export(Never(), 3)


def test_outputs_have_names():
    x, y = torch.zeros(1), torch.ones(1)
    assert outputs(x) == {"output": x}
    assert outputs({"logits": x, "none": None, "other": y}) == {"logits": x, "other": y}
    assert outputs((x, [y, None])) == {"output_0": x, "output_1": y}
    assert outputs({"logits": x, "states": (y,)}) == {"output_0": x, "output_1": y}
