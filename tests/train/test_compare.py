import ast
import json
from pathlib import Path

import pytest

from grkan.train import compare as module
from grkan.train.compare import compare

ARGUMENTS = {"depth": 1, "embed_dim": 16, "num_heads": 2}
RUNS = {
    "KAT": {"model": "kat_micro_patch2_8", "model_args": ARGUMENTS, "epochs": 1, "batch_size": 256},
    "ViT": {"model": "vit_micro_patch2_8", "model_args": ARGUMENTS, "epochs": 1, "batch_size": 256},
}


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared")
    return folder, compare(RUNS, folder)


def test_runs_end_side_by_side(compared):
    folder, summaries = compared
    assert list(summaries) == ["KAT", "ViT"]
    assert summaries == json.loads((folder / "comparison.json").read_text())
    assert (folder / "curves.png").stat().st_size > 1000
    assert summaries["KAT"]["parameters"] > summaries["ViT"]["parameters"]


def test_finished_runs_are_not_repeated(compared, monkeypatch):
    folder, summaries = compared
    monkeypatch.setattr(module, "train", lambda config: pytest.fail("trained again"))
    before = (folder / "KAT" / "metrics.jsonl").read_bytes()
    again = compare(RUNS, folder)
    assert {name: s["top1"] for name, s in again.items()} == {name: s["top1"] for name, s in summaries.items()}
    assert (folder / "KAT" / "metrics.jsonl").read_bytes() == before


def test_a_folder_with_other_settings_is_refused(compared):
    with pytest.raises(ValueError, match=r"KAT holds a run with epochs = 1, not 2; choose another --output"):
        compare({"KAT": {**RUNS["KAT"], "epochs": 2}}, compared[0])


def test_a_run_that_saved_nothing_starts_afresh(tmp_path):
    folder = tmp_path / "ViT"
    folder.mkdir()
    (folder / "config.yaml").write_text("lr: 1.0e+20")
    summaries = compare({"ViT": RUNS["ViT"]}, tmp_path)
    assert summaries["ViT"]["epochs"] == 1


def test_a_mistake_in_any_run_is_found_before_the_first_starts(tmp_path):
    with pytest.raises(ValueError, match="unknown setting 'epoch'"):
        compare({"KAT": RUNS["KAT"], "ViT": {"epoch": 1}}, tmp_path)
    assert not list(tmp_path.iterdir())


def test_training_does_not_import_what_stands_above_it():
    for path in Path(module.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = {alias.name for alias in node.names} if isinstance(node, (ast.Import, ast.ImportFrom)) else set()
            names |= set((node.module or "").split(".")) if isinstance(node, ast.ImportFrom) else set()
            assert not names & {"cli", "bench"}, path


def test_no_runs(tmp_path):
    with pytest.raises(ValueError, match="runs must name at least one"):
        compare({}, tmp_path)
