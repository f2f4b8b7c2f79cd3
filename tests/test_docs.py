"""The lines of docs/in_other_hands.md and docs/deploy.md run; those of several processes do in `two_processes.py`."""

import importlib.util
import re
import shutil
from pathlib import Path

import pytest

import grkan

DOCS = Path(__file__).parent.parent / "docs"
IN_TWO_PROCESSES = ("FSDP2", "Tensor parallelism", "DDP")


def sections(page):
    """The text in front of the first title, and by title what follows."""
    text = (DOCS / page).read_text(encoding="utf-8")
    return text.partition("\n## ")[0], dict(
        re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    )


FIRST, SECTIONS = sections("in_other_hands.md")
DEPLOY_FIRST, DEPLOY = sections("deploy.md")


def blocks(text):
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def run(title, texts, namespace):
    for number, block in enumerate(texts):
        exec(compile(block, f"{title}, block {number}", "exec"), namespace)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("section", [name for name in SECTIONS if name not in IN_TWO_PROCESSES])
def test_lines_run(section, tmp_path, monkeypatch):
    for package in ("timm", "scipy", "safetensors", "transformers", "peft", "torchao", "accelerate"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    first, own = blocks(FIRST), blocks(SECTIONS[section])
    assert len(first) == 1
    assert own
    run(section, first + own, {})


@pytest.mark.filterwarnings("ignore")
def test_lines_about_deployment_run(tmp_path, monkeypatch):
    """One after the other: each stands on those before."""
    for package in ("timm", "onnx", "onnxscript", "onnxruntime", "huggingface_hub", "safetensors"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    run("the beginning", blocks(DEPLOY_FIRST), namespace)
    left_out = []
    for section, text in DEPLOY.items():
        if why_not(section):
            left_out.append(f"{section}: {why_not(section)}")
        else:
            run(section, blocks(text), namespace)
    assert sum(bool(blocks(text)) for text in DEPLOY.values()) >= 5
    assert len(left_out) <= 3, left_out


def why_not(section):
    """What a section needs that is not there."""
    if section == "OpenVINO" and not installed("openvino"):
        return "OpenVINO is not installed"
    if section == "ONNX Runtime with grkan's kernel" and not has_library():
        return "this installation has no library for ONNX Runtime"
    if section == "PyTorch without grkan" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        return "there is no C++ compiler"
    return ""


def installed(package):
    return importlib.util.find_spec(package) is not None


def has_library():
    try:
        return grkan.onnx_library().is_file()
    except RuntimeError:
        return False
