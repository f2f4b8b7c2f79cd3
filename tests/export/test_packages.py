"""Programs and packages of PyTorch compute what the model does, in a process that has no grkan."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch._inductor

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


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
def test_they_run_without_grkan_for_any_batch(tmp_path):
    """A whole model as a program, and a layer compiled, which takes a while; docs/deploy.md compiles a whole model."""
    layer = models.changed(grkan.GRKAN(16, 32))
    exports = {"pt2": (kat(), None, [images(1), images(5)])}
    if shutil.which("g++") or shutil.which("clang++"):
        exports["aoti"] = (layer, torch.randn(2, 16), [torch.randn(1, 16), torch.randn(5, 16)])
    code = "import sys; sys.modules['grkan'] = None\nimport torch\n"
    for format, (model, example, inputs) in exports.items():
        path = grkan.export(model, tmp_path / f"{format}.pt2", format=format, example=example)
        pairs = tmp_path / f"{format}.pt"
        torch.save([(x, model(x)) for x in inputs], pairs)
        code += f"""
path = {str(path)!r}
model = {LOADERS[format]}
with torch.no_grad():
    for x, y in torch.load({str(pairs)!r}):
        assert (model(x) - y).abs().max() <= 1e-5 * y.abs().max(), path
"""
    assert {file.suffix for file in tmp_path.iterdir()} == {".pt2", ".pt"}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=200)
    if "aoti" not in exports:
        pytest.skip("AOTInductor needs a C++ compiler")


def test_what_cannot_be_traced(tmp_path):
    class Untraceable(torch.nn.Module):
        def forward(self, x):
            return x if float(x.sum()) > 0 else -x

    with pytest.raises(ValueError, match=r"model cannot be traced by torch\.export: \w+: .*dynamic=False") as error:
        grkan.export(Untraceable(), tmp_path / "m.pt2", format="pt2", example=torch.ones(2, 3))
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_without_a_compiler(tmp_path, monkeypatch):
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", fail)
    with pytest.raises(ValueError, match=r"model cannot be compiled by AOTInductor: RuntimeError: no compiler$"):
        grkan.export(kat(), tmp_path / "m.pt2", format="aoti")
    assert list(tmp_path.iterdir()) == []


def fail(*_, **__):
    try:
        raise RuntimeError("no compiler\nand more")
    except RuntimeError as error:
        raise AssertionError("pages and pages") from error
