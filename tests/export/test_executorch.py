"""ExecuTorch's programs compute what the model does."""

import importlib.util
from pathlib import Path

import pytest
import torch

import grkan

pytest.importorskip("timm")
runtime = pytest.importorskip("executorch.runtime", reason="the format executorch needs ExecuTorch")

SPEC = importlib.util.spec_from_file_location("export_models", Path(__file__).parent / "models.py")
models = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(models)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
def test_one_image(tmp_path):
    model, x = models.kat(), models.images(1)
    path = grkan.export(model, tmp_path / "model.pte", format="executorch")
    assert list(tmp_path.iterdir()) == [path]
    assert b"Xnnpack" in path.read_bytes()
    (y,) = runtime.Runtime.get().load_program(path).load_method("forward").execute([x])
    models.agree(y, model(x))
