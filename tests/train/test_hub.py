"""Hugging Face's data sets are the images of a folder, too."""

import pickle
import shutil

import numpy as np
import pytest

from grkan.train.config import make_config
from grkan.train.data import absolute, find_source
from grkan.train.loop import train

datasets = pytest.importorskip("datasets")


@pytest.fixture
def hub_folder(image_folder, tmp_path, monkeypatch):
    """The images of `image_folder` in Parquet files."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    root = tmp_path / "hub"
    root.mkdir()
    for split, name in (("train", "train"), ("val", "validation")):
        paths = sorted((image_folder / split).rglob("*.png"))
        rows = {
            "image": [{"bytes": path.read_bytes(), "path": path.name} for path in paths],
            "label": [int(path.parent.name == "dog") for path in paths],
        }
        datasets.Dataset.from_dict(rows, features).to_parquet(root / f"{name}-00000-of-00001.parquet")
    return root


def test_the_images_are_those_of_the_folder(image_folder, hub_folder, tmp_path):
    datasets.load_dataset(str(hub_folder)).save_to_disk(tmp_path / "saved")
    for data in (hub_folder, tmp_path / "saved"):
        for split in ("train", "test"):
            hub, folder = (find_source(name).load(split) for name in (f"hfds:{data}", str(image_folder)))
            assert hub.classes == folder.classes
            assert (hub.labels == folder.labels).all()
            again = pickle.loads(pickle.dumps(hub))  # as another process gets it
            for i in range(len(folder)):
                assert np.array_equal(np.asarray(again.open(i)), np.asarray(folder.open(i)))
        assert hub.name(0) == f"{data}, validation: 0.png"


def test_a_run(hub_folder, tiny):
    settings = {**tiny, "data": f"hfds:{hub_folder}", "batch_size": 4, "workers": 1}
    assert train(make_config(settings))["epochs"] == 2


def test_a_part_of_the_training_images_is_kept_for_the_test(image_folder, hub_folder, tmp_path):
    with pytest.raises(ValueError, match=r"val_split is only for data without test images; hfds:\S+ has validation$"):
        find_source(f"hfds:{hub_folder}", 0.3).load("train")
    train = datasets.load_dataset(str(hub_folder))["train"]
    datasets.DatasetDict({"train": train}).save_to_disk(tmp_path / "train")
    shutil.rmtree(image_folder / "val")
    hub, folder = (find_source(data, 0.3, seed=1) for data in (f"hfds:{tmp_path / 'train'}", str(image_folder)))
    for split, count in (("train", 8), ("test", 4)):
        ours, theirs = hub.load(split), folder.load(split)
        assert len(ours) == count
        assert (ours.labels == theirs.labels).all()
        for i in range(count):
            assert np.array_equal(np.asarray(ours.open(i)), np.asarray(theirs.open(i)))


def test_labels_without_names(hub_folder, tmp_path):
    rows = datasets.load_dataset(str(hub_folder))["train"]
    for values, classes in (([3] * 6 + [7] * 6, ("3", "7")), (["b"] * 6 + ["a"] * 6, ("a", "b"))):
        other = rows.remove_columns("label").add_column("label", values)
        datasets.DatasetDict({"train": other}).save_to_disk(tmp_path / classes[0])
        found = find_source(f"hfds:{tmp_path / classes[0]}").load("train")
        assert found.classes == classes
        assert [found.classes[label] for label in found.labels] == [str(value) for value in values]


def test_what_is_wrong_is_named(hub_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"--data hfds:.*/empty cannot be read: "):
        find_source(f"hfds:{tmp_path / 'empty'}").load("train")
    loaded = datasets.load_dataset(str(hub_folder))
    datasets.DatasetDict({"train": loaded["train"]}).save_to_disk(tmp_path / "train")
    with pytest.raises(
        ValueError, match=r"has no split val or .* or testing; it has train \(use grkan train --val-split"
    ):
        find_source(f"hfds:{tmp_path / 'train'}").load("test")
    for name, column in (("no_images", "image"), ("no_labels", "label")):
        loaded.remove_columns(column).save_to_disk(tmp_path / name)
        with pytest.raises(
            ValueError, match="must have a column of images, and one of classes or one named `label`; it has "
        ):
            find_source(f"hfds:{tmp_path / name}").load("train")


def test_names_stay_and_folders_become_absolute(hub_folder, monkeypatch):
    monkeypatch.chdir(hub_folder.parent)
    assert absolute("hfds:hub") == f"hfds:{hub_folder}"
    assert absolute("hfds:owner/name") == "hfds:owner/name"
    assert absolute("wds:hub") == f"wds:{hub_folder}"
