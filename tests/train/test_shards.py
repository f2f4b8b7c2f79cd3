"""Images in tar files are those of a folder, in the same order."""

import io
import shutil
import tarfile

import numpy as np
import pytest

from grkan.train import shards
from grkan.train.config import make_config
from grkan.train.data import find_source
from grkan.train.loop import train
from grkan.train.metrics import read_metrics


def _add(tar, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


@pytest.fixture
def shard_folder(image_folder, tmp_path):
    """The images of `image_folder` in two tar files a split."""
    root = tmp_path / "shards"
    for split in ("train", "val"):
        (root / split).mkdir(parents=True)
        images = sorted((image_folder / split).rglob("*.png"))
        half = len(images) // 2
        for k, part in enumerate((images[:half], images[half:])):
            with tarfile.open(
                root / split / f"{k}.tar", "w", format=(tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)[k]
            ) as tar:
                for path in part:
                    key = f"{'long/' * 30 * k}{path.parent.name}.d/{path.stem}"
                    _add(tar, f"{key}.cls", b"%d\n" % (path.parent.name == "dog"))
                    _add(tar, f"{key}.json", b"{}")
                    _add(tar, f"{key}.PNG", path.read_bytes())
    (root / "classes.txt").write_text("cat\ndog\n")
    return root


def test_the_images_are_those_of_the_folder(image_folder, shard_folder):
    for split in ("train", "test"):
        tar, folder = (find_source(data).load(split) for data in (f"wds:{shard_folder}", str(image_folder)))
        assert tar.classes == folder.classes == ("cat", "dog")
        assert (tar.labels == folder.labels).all()
        for i in range(len(folder)):
            assert np.array_equal(np.asarray(tar.open(i)), np.asarray(folder.open(i)))
    assert tar.name(0).endswith("val/0.tar/cat.d/0.PNG")
    (shard_folder / "classes.txt").unlink()
    assert find_source(f"wds:{shard_folder}").load("train").classes == ("0", "1")


def test_a_run_is_that_of_the_folder(image_folder, shard_folder, tiny, tmp_path):
    losses = []
    for name, data in (("tar", f"wds:{shard_folder}"), ("folder", image_folder)):
        settings = {**tiny, "data": str(data), "batch_size": 4, "workers": 0, "output": str(tmp_path / name)}
        train(make_config(settings, {"log_every": 1}))
        losses.append([line["train_loss"] for line in read_metrics(tmp_path / name / "metrics.jsonl")])
    assert losses[0] == losses[1]


def test_a_part_of_the_training_images_is_kept_for_the_test(image_folder, shard_folder):
    with pytest.raises(ValueError, match=r"val_split is only for data without test images; wds:\S+ has val$"):
        find_source(f"wds:{shard_folder}", 0.3).load("train")
    for root in (image_folder, shard_folder):
        shutil.rmtree(root / "val")
    with pytest.raises(
        ValueError, match=r"of tar files; it has none \(use grkan train --val-split 0\.1 to test on a part"
    ):
        find_source(f"wds:{shard_folder}").load("test")
    tar, folder = (find_source(data, 0.3, seed=1) for data in (f"wds:{shard_folder}", str(image_folder)))
    for split, name, count in (("train", "train", 8), ("test", "val", 4)):
        ours, theirs = tar.load(split), folder.load(split)
        assert len(ours) == len(tar.load_split(name)) == count
        assert (ours.labels == theirs.labels).all()
        for i in range(count):
            assert np.array_equal(np.asarray(ours.open(i)), np.asarray(theirs.open(i)))


def test_the_index_is_made_once_and_again_after_a_change(shard_folder, tmp_path, monkeypatch, capsys):
    made, read = [], shards._read_shard
    monkeypatch.setattr(shards, "_read_shard", lambda path, is_image: made.append(path.name) or read(path, is_image))
    source = find_source(f"wds:{shard_folder}")
    source.load("train")
    assert "indexing 2 tar files" in capsys.readouterr().err
    source.load("train")
    assert sorted(made) == ["0.tar", "1.tar"]
    index = shard_folder / "train" / "grkan-index-train.npz"
    index.write_bytes(index.read_bytes()[:100])
    source.load("train")
    assert len(made) == 4
    with tarfile.open(shard_folder / "train" / "1.tar", "a") as tar:
        _add(tar, "x.cls", b"1")
        _add(tar, "x.png", b"")
    assert len(source.load("train")) == 13
    assert len(made) == 6


def test_the_index_of_shards_that_are_read_only_is_the_runs(shard_folder, tmp_path, monkeypatch):
    write = shards.write_bytes

    def read_only(path, content):
        if shard_folder in path.parents:
            raise PermissionError(13, "Permission denied", str(path))
        write(path, content)

    monkeypatch.setattr(shards, "write_bytes", read_only)
    find_source(f"wds:{shard_folder}", keep=tmp_path / "run" / "state").load("train")
    assert (tmp_path / "run" / "state" / "grkan-index-train.npz").exists()
    monkeypatch.setattr(shards, "_make_index", None)
    assert len(find_source(f"wds:{shard_folder}", keep=tmp_path / "run" / "state").load("train")) == 12


def _append(name, content):
    def append(root):
        with tarfile.open(root / "train" / "1.tar", "a") as tar:
            _add(tar, name, content)

    return append


def _truncate(root):
    path = root / "train" / "1.tar"
    path.write_bytes(path.read_bytes()[:3000])


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (_append("y.png", b""), r"1\.tar: the sample y has no class \(a \.cls file with its number\)$"),
        (_append("y.cls", b"1"), r"1\.tar: the sample y has no image$"),
        (_append("y.cls", b"dog"), r"1\.tar: y\.cls must hold the number of a class, from 0; got b'dog'$"),
        (_truncate, r"1\.tar cannot be read as an uncompressed tar file: "),
        (
            lambda root: (root / "train" / "1.tar").write_bytes(b"\x1f\x8b" * 999),
            r"1\.tar cannot be read as an uncompressed tar file",
        ),
        (lambda root: (root / "train" / "2.tar.gz").touch(), r"2\.tar\.gz is compressed, so it has no random access"),
        (lambda root: [path.unlink() for path in (root / "train").glob("*.tar")], r"holds no tar files \(\*\.tar\)"),
        (lambda root: (root / "train").rename(root / "x"), r"must hold a folder train or training of tar files"),
        (lambda root: (root / "classes.txt").write_text("cat\n"), r"names 1 classes, but .*train has class 1"),
        (
            lambda root: (root / "classes.txt").write_text("a\na\n"),
            r"must have one class name per line, without repeats or empty lines; got 'a'",
        ),
        (lambda root: (root / "classes.txt").write_bytes(b"\xff"), r"classes\.txt is not UTF-8"),
    ],
)
def test_what_is_wrong_is_named(shard_folder, break_it, message):
    break_it(shard_folder)
    with pytest.raises(ValueError, match=message):
        find_source(f"wds:{shard_folder}").load("train")


@pytest.mark.parametrize("place", ["https://x/train/0.tar", "s3://bucket/x", "pipe:cat 0.tar", "nowhere"])
def test_what_is_no_folder_is_refused_with_the_reason(place):
    reason = "there is no such folder" if place == "nowhere" else "remote shards have no random access"
    with pytest.raises(ValueError, match=reason):
        find_source(f"wds:{place}")


def test_damaged_images_are_left_out(shard_folder, tiny, tmp_path, capsys):
    _append("y.cls", b"1")(shard_folder)
    _append("y.png", b"no image")(shard_folder)
    settings = {"data": f"wds:{shard_folder}", "batch_size": 13, "workers": 0, "epochs": 1}
    assert train(make_config(tiny, settings))["unreadable"] == 1
    assert "train/1.tar/y.png" in capsys.readouterr().err
