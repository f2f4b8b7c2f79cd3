"""What surrounds the code says the same as the code."""

import re
from pathlib import Path

import pytest

import grkan

ROOT = Path(__file__).parent.parent
yaml = pytest.importorskip("yaml")


def _yaml(name):
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def test_one_version():
    assert _yaml("CITATION.cff")["version"] == grkan.__version__
    assert 'version = { attr = "grkan._version.__version__" }' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_workflows_run_targets_that_there_are():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    used = set()
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        text = path.read_text(encoding="utf-8")
        assert yaml.safe_load(text)["jobs"]
        used |= set(re.findall(r"\bmake ([a-z-]+)", text))
    assert used
    assert used <= targets


def test_the_oldest_python_of_ci_is_that_of_the_package():
    legs = _yaml(".github/workflows/test.yml")["jobs"]["test"]["strategy"]["matrix"]["include"]
    oldest = next(leg["python"] for leg in legs if leg["name"] == "oldest")
    assert f'requires-python = ">={oldest}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_issue_forms_have_what_github_wants_of_them():
    forms = list((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
    assert forms
    for form in forms:
        content = _yaml(form.relative_to(ROOT))
        assert content["name"]
        assert content["description"]
        assert all(part["type"] in ("textarea", "input", "markdown") for part in content["body"])
