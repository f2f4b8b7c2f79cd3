"""Programs and packages of PyTorch compute what the model does, in a process that has no grkan."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import grkan

pytest.importorskip("timm")

SPEC = importlib.util.spec_from_file_location("export_models", Path(__file__).parent / "models.py")
models = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(models)
images, kat = models.images, models.kat

LOADERS = {
    "pt2": "torch.export.load(path).module()",
    "aoti": "torch._inductor.aoti_load_package(path)",
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("format", LOADERS)
def test_runs_without_grkan_for_any_batch(tmp_path, format):
    if format == "aoti" and shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("AOTInductor needs a C++ compiler")
    model = kat()
    path = grkan.export(model, tmp_path / "model.pt2", format=format)
    assert list(tmp_path.iterdir()) == [path]
    torch.save([(x, model(x).detach()) for x in (images(1), images(5))], tmp_path / "pairs.pt")
    code = f"""
import sys
sys.modules["grkan"] = None
import torch
path, pairs = {str(path)!r}, torch.load({str(tmp_path / "pairs.pt")!r})
model = {LOADERS[format]}
with torch.no_grad():
    for x, y in pairs:
        assert (model(x) - y).abs().max() <= 1e-5 * y.abs().max()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=200)


def test_what_cannot_be_traced(tmp_path):
    class Untraceable(torch.nn.Module):
        def forward(self, x):
            return x if float(x.sum()) > 0 else -x

    with pytest.raises(ValueError, match=r"model cannot be traced by torch\.export: \w+: .*dynamic=False") as error:
        grkan.export(Untraceable(), tmp_path / "m.pt2", format="pt2", example=torch.ones(2, 3))
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []
