"""The lines of docs/in_other_hands.md run; those of several processes do in `two_processes.py`."""

import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parent.parent / "docs" / "in_other_hands.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE))
IN_TWO_PROCESSES = ("FSDP2", "Tensor parallelism", "DDP")


def blocks(text):
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("section", [name for name in SECTIONS if name not in IN_TWO_PROCESSES])
def test_lines_run(section, tmp_path, monkeypatch):
    for package in ("timm", "scipy", "safetensors", "transformers", "peft", "torchao", "accelerate"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    first, own = blocks(PAGE.partition("\n## ")[0]), blocks(SECTIONS[section])
    assert len(first) == 1
    assert own
    for number, block in enumerate(first + own):
        exec(compile(block, f"{section}, block {number}", "exec"), namespace)
