"""The lines of the pages in docs/ run; those of in_other_hands.md for several processes do in `two_processes.py`."""

import importlib.util
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

import grkan
from grkan import cli
from grkan.train.config import make_config, read_yaml

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
    if section == "timm" and importlib.util.find_spec("timm.models._input") is None:
        pytest.skip("this timm does not save a model's arguments")
    monkeypatch.chdir(tmp_path)
    first, own = blocks(FIRST), blocks(SECTIONS[section])
    assert len(first) == 1
    assert own
    run(section, first + own, {})


KEPT = []  # OpenVINO must not be freed by another thread, see grkan.export.openvino.core


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
    KEPT.append(namespace.get("core"))
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


COMMANDS = re.findall(
    r"^grkan .*$",
    "\n".join(re.findall(r"```sh\n(.*?)```", (DOCS / "own_images.md").read_text(encoding="utf-8"), re.DOTALL)).replace(
        "\\\n", " "
    ),
    re.MULTILINE,
)


def test_commands_for_own_images_run(tmp_path, monkeypatch, capsys):
    """On images of 8 x 8 pixels, one epoch each."""
    pytest.importorskip("accelerate")
    import numpy as np
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    for name in ("cat", "dog", "emu"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(10):
            pixels = np.random.default_rng(i).integers(0, 256, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{i}.png")
    assert len(COMMANDS) == 6
    for command in COMMANDS:
        more = ["--epochs=1", "--workers=0"] if command.startswith("grkan train") else []
        assert cli.main([*shlex.split(command)[1:], *more]) == 0, command
    out, err = capsys.readouterr()
    assert err == ""
    assert "photos: 24 images of 3 classes" in out
    assert (tmp_path / "confusion.png").exists()


CLUSTER = (DOCS / "cluster.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("script", re.findall(r"```bash\n(.*?)```", CLUSTER, re.DOTALL))
def test_scripts_of_the_cluster_page_are_right(script):
    """As far as that can be seen without a cluster: the shell reads them, and grkan takes its options."""
    checked = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, timeout=10)
    assert (checked.returncode, checked.stderr) == (0, "")
    (command,) = re.findall(r"-m grkan (.*?)(?: &)?$", script.replace("\\\n", " "), re.MULTILINE)
    options = cli._parser().parse_args(shlex.split(command))
    assert options.auto_resume
    for path in re.findall(r"configs/\w+\.yaml", script):
        make_config(read_yaml(Path(__file__).parent.parent / path), *options.settings)
