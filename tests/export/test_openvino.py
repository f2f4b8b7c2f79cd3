"""OpenVINO's files compute what the model does."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import grkan

pytest.importorskip("openvino", reason="the format openvino needs OpenVINO")
for package in ("onnx", "onnxruntime", "onnxscript", "timm"):
    pytest.importorskip(package)

from grkan.export.job import Call  # noqa: E402
from grkan.export.openvino import core, runner  # noqa: E402

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
    compiled = core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    assert compiled.input("x").partial_shape.to_string() == "[?,1,8,8]"
    for x in (images(1), images(5)):
        agree(compiled({"x": x.numpy()})["output"], model(x))
    fixed = runner(path, threads=1, fixed=Call((images(3),)))
    agree(fixed(Call((images(3),)))[0], model(images(3)))
    with pytest.raises(RuntimeError):
        fixed(Call((images(2),)))
    read = core().read_model(path)
    assert read.get_rt_info(["grkan", "model"]).astype(str) == "kat_micro_patch2_8"


FREED_ELSEWHERE = """
import gc, signal, sys, threading
from pathlib import Path
from grkan.export.openvino import runner
kept = [runner(Path(sys.argv[1]))]
thread = threading.Thread(target=lambda: (kept.clear(), gc.collect()))
thread.start()
thread.join()
signal.signal(signal.SIGTERM, lambda *_: print("handled"))
signal.raise_signal(signal.SIGTERM)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no signal stacks")
def test_signals_are_handled_after_another_thread_has_freed_a_model(tmp_path):
    path = grkan.export(kat(), tmp_path / "model.xml", format="openvino")
    command = [sys.executable, "-c", FREED_ELSEWHERE, str(path)]
    assert subprocess.run(command, capture_output=True, text=True, timeout=120).stdout == "handled\n"


def test_the_ending(tmp_path):
    with pytest.raises(ValueError, match=r"path must end in \.xml for format 'openvino'"):
        grkan.export(kat(), tmp_path / "model.onnx", format="openvino")
