"""The lines of the pages in docs/ run; those of in_other_hands.md for several processes do in `two_processes.py`."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from grkan import cli
from grkan.train.config import make_config, read_yaml

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


CLUSTER = (Path(__file__).parent.parent / "docs" / "cluster.md").read_text(encoding="utf-8")


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
