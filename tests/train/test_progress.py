"""What a run tells, on a terminal of 80 columns and on one that is closed, or knows few letters."""

import io
import re

import pytest

from grkan.train import progress
from grkan.train.progress import Reporter


@pytest.mark.parametrize("width", [80, 120])
def test_the_figures_have_room(width, monkeypatch):
    written = io.StringIO()
    console = progress._Console(file=written, force_terminal=True, width=width, highlight=False)
    monkeypatch.setattr(progress, "make_console", lambda: console)
    with Reporter(True, 375_300, 12_510) as reporter:
        reporter.step("epoch 100/300", 2.3026, 10.0, 12_345.0)
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written.getvalue()).strip().splitlines()[-1]
    assert len(last) <= width
    for figure in ("epoch 100/300", "12511/375300", "loss 2.3026", "10.00 %", "12345 images/s", "left"):
        assert figure in last
    assert "…" not in last
    assert ("━" in last) == (width == 120)


def test_names_are_printed_as_they_are(capsys):
    with Reporter(True, 1) as reporter:
        reporter.line("photos/[bold]markup[red]/:cat:.jpg")
    assert capsys.readouterr().out == "photos/[bold]markup[red]/:cat:.jpg\n"
