"""The pages of docs/: their lines run, from top to bottom, and they become a site without a warning."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from .browser import opened, overflowing

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = ("quickstart", "layer", "images", "convert")


def _blocks(page):
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("name", PAGES)
def test_lines_run(name, tmp_path, monkeypatch):
    for package in ("timm", "scipy", "safetensors"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    blocks = _blocks(DOCS / f"{name}.md")
    assert blocks
    for number, block in enumerate(blocks, 1):
        exec(compile(block, f"{name}.md, block {number}", "exec"), namespace)


def test_no_page_is_forgotten():
    """The lines of every other page are run by a test that names it."""
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py"))
    with_code = {page.stem for page in DOCS.glob("*.md") if _blocks(page)}
    assert [name for name in sorted(with_code - set(PAGES)) if f"{name}.md" not in tests] == []


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    for package in ("sphinx", "myst_parser", "pydata_sphinx_theme", "sphinx_copybutton"):
        pytest.importorskip(package, reason=f"{package} makes the site")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", str(DOCS), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_the_site_is_whole(site):
    pages = {page.stem for page in DOCS.glob("*.md")}
    assert pages <= {page.stem for page in site.glob("*.html")}
    api = (site / "api.html").read_text(encoding="utf-8")
    for name in ("group_rational", "GRKAN", "convert_", "save_model"):
        assert f'id="grkan.{name}"' in api


@pytest.mark.slow
def test_no_page_is_wider_than_a_telephone(site):
    wide = {}
    with opened((site / "index.html").as_uri(), viewport={"width": 360, "height": 740}) as page:
        for path in sorted(site.glob("*.html")):
            page.goto(path.as_uri())
            if page.evaluate("document.documentElement.scrollWidth > innerWidth"):
                wide[path.name] = overflowing(page)
        assert wide == {}
