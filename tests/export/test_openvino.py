"""OpenVINO's files compute what the model does."""

import importlib.util
from pathlib import Path

import pytest
import torch

import grkan

openvino = pytest.importorskip("openvino", reason="the format openvino needs OpenVINO")
for package in ("onnx", "onnxruntime", "onnxscript", "timm"):
    pytest.importorskip(package)

from grkan.export.job import Call  # noqa: E402
from grkan.export.openvino import runner  # noqa: E402

SPEC = importlib.util.spec_from_file_location("export_models", Path(__file__).parent / "models.py")
models = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(models)
agree, images, kat = models.agree, models.images, models.kat


@torch.no_grad()
@pytest.mark.parametrize("arguments", [{}, {"dynamic_img_size": True}], ids=["usual", "any size in PyTorch"])
def test_any_batch(tmp_path, arguments):
    model = kat(**arguments)
    path = grkan.export(model, tmp_path / "model.xml", format="openvino")
    assert {file.name for file in tmp_path.iterdir()} == {"model.xml", "model.bin"}
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    assert compiled.input("x").partial_shape.to_string() == "[?,1,8,8]"
    for x in (images(1), images(5)):
        agree(compiled({"x": x.numpy()})["output"], model(x))
    fixed = runner(path, threads=1, fixed=Call((images(3),)))
    agree(fixed(Call((images(3),)))[0], model(images(3)))
    with pytest.raises(RuntimeError):
        fixed(Call((images(2),)))
    read = openvino.Core().read_model(path)
    assert read.get_rt_info(["grkan", "model"]).astype(str) == "kat_micro_patch2_8"


def test_the_ending(tmp_path):
    with pytest.raises(ValueError, match=r"path must end in \.xml for format 'openvino'"):
        grkan.export(kat(), tmp_path / "model.onnx", format="openvino")
