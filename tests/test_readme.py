"""Every Python example of the README runs, top to bottom, in one session, as a reader would try them."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def test_it_is_short_and_has_examples():
    assert len(README.read_text(encoding="utf-8").split()) <= 1000
    assert len(BLOCKS) >= 2


def test_examples_run(tmp_path, monkeypatch):
    for package in ("timm", "scipy", "safetensors"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for number, block in enumerate(BLOCKS, 1):
        exec(compile(block, f"README.md, example {number}", "exec"), namespace)
