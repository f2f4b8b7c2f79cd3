import gzip
import os
import shutil
import struct

import numpy as np
import pytest
from PIL import Image

from grkan.train.data import (
    DEBIAN_FASHION_MNIST,
    ImageData,
    absolute,
    describe,
    find_source,
    gray_statistics,
    match_classes,
)


def test_digits_are_split_by_class_without_overlap():
    source = find_source("digits")
    train, test = source.load("train"), source.load("test")
    assert (len(train), len(test)) == (1442, 355)
    counts = np.bincount(test.labels) / np.bincount(train.labels)
    assert (np.abs(counts - 0.25) < 0.01).all()
    union = np.concatenate([train.images, test.images])
    from sklearn.datasets import load_digits

    assert union.sum() == np.rint(load_digits().images * 255 / 16).sum()


def _write_idx(path, array, magic=None):
    header = struct.pack(f">{array.ndim + 1}I", magic or 0x0800 + array.ndim, *array.shape)
    content = header + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.fixture
def fashion(tmp_path):
    for stem, count, suffix in (("train", 7, ".gz"), ("t10k", 3, "")):
        pixels = np.arange(count * 784).reshape(count, 28, 28) % 256
        _write_idx(tmp_path / f"{stem}-images-idx3-ubyte{suffix}", pixels)
        _write_idx(tmp_path / f"{stem}-labels-idx1-ubyte{suffix}", np.arange(count))
    return tmp_path


def test_fashion_mnist_is_read_compressed_or_not(fashion):
    source = find_source(f"fashion-mnist:{fashion}")
    train, test = source.load("train"), source.load("test")
    assert train.images.shape == (7, 28, 28)
    assert train.images[1, 0, :3].tolist() == [16, 17, 18]
    assert test.labels.tolist() == [0, 1, 2]
    assert train.classes[9] == "Ankle boot"


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: (f / "train-images-idx3-ubyte.gz").unlink(), "holds neither train-images-idx3-ubyte nor"),
        (lambda f: (f / "train-images-idx3-ubyte.gz").write_bytes(b"no gzip"), "is damaged"),
        (
            lambda f: _write_idx(f / "train-images-idx3-ubyte.gz", np.zeros((7, 2, 2)), 0x0D03),
            "not an IDX file of bytes with 3 dimensions",
        ),
        (lambda f: _write_idx(f / "train-labels-idx1-ubyte.gz", np.zeros(6)), "7 train images, but 6 labels"),
        (lambda f: _write_idx(f / "train-labels-idx1-ubyte.gz", np.full(7, 10)), "labels must lie in 0..9; got 10"),
        (
            lambda f: (f / "train-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01\0\0\0\x07\0\0"),
            "it has 10 bytes, but its header says 15",
        ),
    ],
)
def test_broken_fashion_mnist_is_named(fashion, break_it, message):
    break_it(fashion)
    with pytest.raises(ValueError, match=message):
        find_source(f"fashion-mnist:{fashion}").load("train")


@pytest.mark.skipif(not DEBIAN_FASHION_MNIST.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_fashion_mnist_of_debian():
    test = find_source("fashion-mnist").load("test")
    assert np.bincount(test.labels).tolist() == [1000] * 10


def test_a_folder_of_images(image_folder):
    source = find_source(str(image_folder))
    train, test = source.load("train"), source.load("test")
    assert train.classes == ("cat", "dog")
    assert train.labels.tolist() == [0] * 6 + [1] * 6
    assert len(test) == 6
    assert len(find_source(str(image_folder / "val")).load("test")) == 6


def test_broken_folders_are_named(image_folder, tmp_path):
    (image_folder / "train" / "emu").mkdir()
    with pytest.raises(ValueError, match=r"images/train has no image of emu$"):
        find_source(str(image_folder)).load("train")
    (tmp_path / "empty" / "train").mkdir(parents=True)
    with pytest.raises(ValueError, match="must hold a folder for each class; it has none"):
        find_source(str(tmp_path / "empty")).load("train")
    with pytest.raises(ValueError, match="must hold a folder val or validation or test"):
        find_source(str(tmp_path / "empty")).load("test")
    for data in (str(tmp_path / "none"), "fashion-mnist:", "digits:x"):
        with pytest.raises(ValueError, match="--data must be digits, fashion-mnist"):
            find_source(data)


def test_what_is_no_image_is_passed_over_and_told(image_folder):
    train = image_folder / "train"
    (train / ".ipynb_checkpoints").mkdir()
    (train / "labels.csv").touch()
    (train / "again").symlink_to(image_folder, target_is_directory=True)
    cat = train / "cat"
    (cat / ".DS_Store").touch()
    (cat / "loop").symlink_to(cat, target_is_directory=True)
    (cat / "itself").symlink_to(cat / "itself")
    (cat / "gone.png").symlink_to("nowhere.png")
    (cat / "notes.txt").touch()
    os.mkfifo(cat / "pipe.png")
    (cat / "more").mkdir()
    (cat / "0.png").rename(cat / "more" / "0.PNG")
    found = find_source(str(image_folder)).load("train")
    assert found.classes == ("cat", "dog")
    assert [str(path.relative_to(train)) for path in found.images][4:7] == ["cat/5.png", "cat/more/0.PNG", "dog/0.png"]
    assert describe(found) == (
        f"{train}: 12 images of 2 classes; skipped: 1 *.txt, 1 beside the class folders, 2 broken links, 2 folders "
        "reached a second time, through a link, 2 hidden, 1 pipes or devices"
    )


def test_a_class_without_test_images_is_named(image_folder):
    shutil.rmtree(image_folder / "val" / "dog")
    source = find_source(str(image_folder))
    test = match_classes(source.load("test"), source.load("train").classes)
    assert describe(test) == f"{image_folder / 'val'}: 3 images of 1 classes, none of 'dog'"


@pytest.mark.parametrize("below", ["train", ""])
def test_a_part_of_each_class_is_kept_for_the_test(image_folder, below):
    shutil.rmtree(image_folder / "val")
    for i in range(6, 20):
        shutil.copy(image_folder / "train" / "cat" / "0.png", image_folder / "train" / "cat" / f"{i}.png")
    root = image_folder / "train"
    data = str(image_folder if below else root)
    with pytest.raises(ValueError, match=r"must hold a folder .*--val-split 0\.1"):
        find_source(data).load("test" if below else "train")
    source, other = (find_source(data, 0.2, seed) for seed in (0, 1))
    train, test = source.load("train"), source.load("test")
    assert np.bincount(train.labels).tolist() == [16, 5]
    assert np.bincount(test.labels).tolist() == [4, 1]
    assert sorted([*train.images, *test.images]) == sorted(root.rglob("*.png"))
    assert list(find_source(data, 0.2).load("test").images) == list(test.images)
    assert list(other.load("test").images) != list(test.images)
    assert describe(test) == f"0.2 of each class of {root}, by seed 0: 5 images of 2 classes"


def test_a_class_of_one_image_is_learned_not_tested(image_folder):
    for i in range(1, 6):
        (image_folder / "train" / "dog" / f"{i}.png").unlink()
    source = find_source(str(image_folder / "train"), 0.9)
    assert np.bincount(source.load("train").labels).tolist() == [1, 1]
    assert "none of 'dog'" in describe(source.load("test"))


def test_what_has_test_images_is_not_split(image_folder):
    with pytest.raises(ValueError, match=r"val_split is only for data without test images; .*images has val$"):
        find_source(str(image_folder), 0.1).load("train")
    for data in ("digits", "fashion-mnist"):
        with pytest.raises(ValueError, match=f"val_split is only for data without test images; {data} has some"):
            find_source(data, 0.1)


def test_a_split_by_its_name(image_folder):
    shutil.copytree(image_folder / "val" / "cat", image_folder / "night" / "cat")
    load = find_source(str(image_folder)).load_split
    assert [len(load(name)) for name in ("train", "val", "night")] == [12, 6, 3]
    with pytest.raises(ValueError, match=r"images has no folder 'nigt'; did you mean night"):
        load("nigt")


@pytest.mark.parametrize(
    ("size", "shift", "hflip", "model"),
    [
        ((8, 8), 1, 0.0, "kat_micro_patch2_8"),
        ((28, 28), 2, 0.0, "kat_micro_patch4_28"),
        ((20, 32), 3, 0.0, "kat_micro_patch4_32"),
        ((65, 30), None, 0.5, "kat_tiny_patch16_224"),
    ],
)
def test_the_size_of_the_images_says_what_suits_them(image_folder, size, shift, hflip, model):
    for path in (image_folder / "train").rglob("*.png"):
        Image.new("L", size).save(path)
    (image_folder / "train" / "cat" / "0.png").write_bytes(b"")
    source = find_source(str(image_folder))
    assert (source.shift, source.hflip, source.model) == (shift, hflip, model)
    assert (source.color_jitter == 0.0) == (shift is not None) == (source.normalisation is not None)
    assert source.kind.endswith(f"of about {size[0]} x {size[1]} pixels")


def test_gray_statistics_are_those_of_the_pixels(image_folder):
    data = find_source(str(image_folder)).load("train")
    (image_folder / "train" / "cat" / "0.png").write_bytes(b"")
    pixels = np.stack([np.asarray(data.open(i)) for i in range(1, 12)]) / 255
    assert gray_statistics(data) == pytest.approx((pixels.mean(), pixels.std()), abs=5.1e-5)
    whole = (pixels * 255).round().astype(np.uint8)
    assert gray_statistics(ImageData(whole, data.labels[1:], data.classes)) == gray_statistics(data)


def test_images_of_one_gray_have_a_deviation_to_divide_by():
    assert gray_statistics(ImageData(np.full((2, 8, 8), 51, np.uint8), np.zeros(2), ("a",))) == (0.2, 1.0)


def test_labels_follow_the_models_classes():
    data = ImageData(np.zeros((2, 8, 8), np.uint8), np.array([0, 1]), ("cat", "dog"))
    assert match_classes(data, ["dog", "emu", "cat"]).labels.tolist() == [2, 0]
    with pytest.raises(ValueError, match="the model has no class 'cat'"):
        match_classes(data, ["dog", "cats"])


def test_paths_do_not_depend_on_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert absolute("images") == str(tmp_path / "images")
    assert absolute("fashion-mnist:files") == f"fashion-mnist:{tmp_path / 'files'}"
    assert [absolute(name) for name in ("digits", "fashion-mnist")] == ["digits", "fashion-mnist"]
