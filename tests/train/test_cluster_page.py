"""The scripts of docs/cluster.md, as far as they can be tested without a cluster."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from grkan import cli
from grkan.train.config import make_config, read_yaml

PAGE = (Path(__file__).parents[2] / "docs" / "cluster.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("script", re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL))
def test_scripts_are_right(script):
    """As far as that can be seen without a cluster: the shell reads them, and grkan takes its options."""
    checked = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, timeout=10)
    assert (checked.returncode, checked.stderr) == (0, "")
    (command,) = re.findall(r"-m grkan (.*?)(?: &)?$", script.replace("\\\n", " "), re.MULTILINE)
    options = cli._parser().parse_args(shlex.split(command))
    assert options.auto_resume
    for path in re.findall(r"configs/\w+\.yaml", script):
        make_config(read_yaml(Path(__file__).parents[2] / path), *options.settings)
