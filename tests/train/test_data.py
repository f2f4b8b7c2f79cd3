import gzip
import os
import shutil
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from grkan.train.config import Config
from grkan.train.data import (
    DEBIAN_FASHION_MNIST,
    ImageData,
    TrainingSampler,
    UnreadableImages,
    absolute,
    describe,
    evaluation_loader,
    evaluation_transform,
    find_source,
    gray_statistics,
    match_classes,
    training_loader,
    training_transform,
)
from grkan.train.randomness import seeded

GRAY = {"input_size": [1, 8, 8], "mean": [0.5], "std": [0.25], "interpolation": "bicubic", "crop_pct": 1.0}
RGB = {**GRAY, "input_size": [3, 8, 8], "mean": [0.5] * 3, "std": [0.25] * 3}
SETTINGS = {"shift": 1, "hflip": 0.5, "color_jitter": 0.0, "workers": 0}


def _indices(sampler):
    return [[index for _, index in part] for part in sampler]


# Sources


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


def test_a_folder_of_pngs_trains_as_the_same_array(image_folder):
    """The same images in the same order give the same batches, to the bit."""
    files = find_source(str(image_folder)).load("train")
    pixels = np.stack([np.asarray(files.open(i)) for i in range(len(files))])
    arrays = ImageData(pixels, files.labels, files.classes)
    for a, b in zip(_batches(files, 0), _batches(arrays, 0), strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)


def test_labels_follow_the_models_classes():
    data = ImageData(np.zeros((2, 8, 8), np.uint8), np.array([0, 1]), ("cat", "dog"))
    assert match_classes(data, ["dog", "emu", "cat"]).labels.tolist() == [2, 0]
    with pytest.raises(ValueError, match="the model has no class 'cat'"):
        match_classes(data, ["dog", "cats"])


# Transforms


@pytest.mark.parametrize(("preprocessing", "channels"), [(GRAY, 1), (RGB, 3)])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1"])
def test_any_image_becomes_the_models_input(preprocessing, channels, mode):
    image = Image.fromarray(np.full((8, 8), 255, np.uint8)).convert(mode)
    x = evaluation_transform(preprocessing)(image)
    assert x.shape == (channels, 8, 8)
    torch.testing.assert_close(x, torch.full_like(x, 2.0))  # (1 - 0.5) / 0.25


def test_a_very_long_image_is_not_resized_whole():
    image = Image.new("L", (1, 100_000), 255)
    x = evaluation_transform({**RGB, "input_size": [3, 224, 224]})(image)
    torch.testing.assert_close(x, torch.full((3, 224, 224), 2.0))


def test_a_shift_moves_the_image_by_at_most_so_many_pixels():
    image = Image.fromarray(np.pad(np.full((2, 2), 255, np.uint8), 3))
    transform = training_transform(GRAY, Config(shift=1, hflip=0.0, color_jitter=0.0))
    corners = set()
    for _ in range(200):
        x = transform(image)[0]
        bright = (x > 1).nonzero()
        assert len(bright) == 4
        corners.add(tuple(bright[0].tolist()))
    assert corners == {(i, j) for i in (2, 3, 4) for j in (2, 3, 4)}


@pytest.mark.parametrize("preprocessing", [GRAY, RGB])
def test_the_papers_augmentation_runs(preprocessing):
    config = Config(auto_augment="rand-m9-mstd0.5-inc1", random_erasing=1.0, hflip=0.5, color_jitter=0.4)
    transform = training_transform(preprocessing, config)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30), dtype=np.uint8))
    for _ in range(30):
        x = transform(image)
        assert x.shape == tuple(preprocessing["input_size"])
        assert x.isfinite().all()


@pytest.mark.parametrize("policy", ["rand-m10-inc1", "v0", "augmix-m10"])
def test_the_strongest_posterisation_leaves_something(policy):
    transform = training_transform(RGB, Config(auto_augment=policy, hflip=0.0, color_jitter=0.0))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8))
    for i in range(100):
        with seeded("policy", i):
            assert transform(image).isfinite().all()


def test_an_unknown_augmentation_is_named():
    with pytest.raises(ValueError, match="timm does not understand auto_augment 'rend-m9'"):
        training_transform(RGB, Config(auto_augment="rend-m9", hflip=0.0, color_jitter=0.0))


# Order


def test_every_image_comes_at_most_once_an_epoch_and_epochs_differ():
    sampler = TrainingSampler(103, 10, 1, [0], seed=0)
    orders = []
    for epoch in (0, 1):
        sampler.start_at(epoch, 0)
        batches = _indices(sampler)
        assert [len(batch) for batch in batches] == [10] * 10
        orders.append([index for batch in batches for index in batch])
        assert len(set(orders[-1])) == 100
    assert orders[0] != orders[1]


def test_starting_at_a_step_gives_the_rest_of_the_epoch():
    sampler = TrainingSampler(40, 8, 2, [0, 1], seed=3)
    sampler.start_at(5, 0)
    whole = list(sampler)
    sampler.start_at(5, 3)
    assert list(sampler) == whole[6:]


@pytest.mark.parametrize("parts", [2, 4])
def test_parts_make_up_the_batch_and_keep_mixups_pairs(parts):
    def pairs(batches):
        return {frozenset((batch[i], batch[-1 - i])) for batch in batches for i in range(len(batch) // 2)}

    whole = _indices(TrainingSampler(32, 16, 1, [0], seed=0))
    divided = [_indices(TrainingSampler(32, 16, parts, [part], seed=0)) for part in range(parts)]
    for step in range(2):
        own = [divided[part][step] for part in range(parts)]
        assert sorted(index for part in own for index in part) == sorted(whole[step])
        assert pairs(own) == pairs([whole[step]])


def test_repeated_images_are_in_one_batch_and_augmented_anew():
    sampler = TrainingSampler(20, 10, 1, [0], seed=0, repeats=3)
    for batch in sampler:
        counts = np.bincount([index % 20 for _, index in batch], minlength=20)
        assert sorted(counts)[-2:] == [3, 3]  # of others, copies are in the batch before or after
    indices = [index for batch in sampler for _, index in batch]
    assert len(set(indices)) == len(indices) == 20
    assert max(indices) < 60


def test_balanced_sampling_takes_as_many_of_each_class():
    labels = np.array([0] * 50 + [1] * 5 + [2] * 2)
    sampler = TrainingSampler(57, 19, 1, [0], seed=0, labels=labels)
    indices = [index for batch in sampler for _, index in batch]
    images = np.array(indices) % 57
    assert np.bincount(labels[images]).tolist() == [19, 19, 19]
    assert len(set(indices)) == 57  # each image that comes again, at another index
    assert sorted(np.bincount(images, minlength=57)[50:55]) == [3, 4, 4, 4, 4]
    assert len(set(images[labels[images] == 0])) == 19
    both = TrainingSampler(57, 19, 1, [0], seed=0, repeats=2, labels=labels)
    indices = [index for batch in both for _, index in batch]
    assert len(set(indices)) == 57


def test_a_repeated_image_has_another_augmentation():
    data = find_source("digits").load("train")
    transform = training_transform(GRAY, Config(**{**SETTINGS, "shift": 3}))
    samples = training_loader(
        data, transform, TrainingSampler(len(data), 4, 1, [0], seed=0), Config(**SETTINGS), pin_memory=False
    ).dataset
    images = [samples[0, 5 + copy * len(data)] for copy in range(4)]
    assert {label for _, label, _ in images} == {data.labels[5]}
    assert any(not torch.equal(image, images[0][0]) for image, _, _ in images[1:])


# Loading


def _batches(data, workers, epoch=0, step=0, config=None):
    config = config or Config(**{**SETTINGS, "workers": workers})
    sampler = TrainingSampler(len(data), 4, 1, [0], seed=0)
    loader = training_loader(data, training_transform(GRAY, config), sampler, config, pin_memory=False)
    sampler.start_at(epoch, step)
    return list(loader)


def test_an_augmented_image_depends_on_seed_epoch_and_index_alone():
    data = find_source("digits").load("train")
    data = ImageData(data.images[:12], data.labels[:12], data.classes)
    alone, shared = _batches(data, workers=0), _batches(data, workers=2)
    later = _batches(data, workers=0, step=2)
    for a, b in zip(alone, shared, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)
    assert torch.equal(alone[2].images, later[0].images)


def test_every_epoch_augments_anew():
    data = find_source("digits").load("train")
    config = Config(**SETTINGS)
    samples = training_loader(
        data, training_transform(GRAY, config), TrainingSampler(len(data), 4, 1, [0], seed=0), config, pin_memory=False
    ).dataset
    images = [samples[epoch, 5][0] for epoch in range(4)]
    assert torch.equal(samples[0, 5][0], images[0])
    assert any(not torch.equal(image, images[0]) for image in images[1:])


def _spoil(path):
    path.write_bytes(path.read_bytes()[:40])


def test_an_unreadable_image_gives_its_place_to_the_next_one(image_folder, capsys):
    _spoil(image_folder / "train" / "cat" / "2.png")
    data = find_source(str(image_folder)).load("train")
    batches = _batches(data, workers=0)
    assert [len(batch.labels) for batch in batches] == [4, 4, 4]
    unreadable = UnreadableImages()
    for batch in batches + batches:
        unreadable.add(batch)
    assert unreadable.names == {str(image_folder / "train" / "cat" / "2.png")}
    assert capsys.readouterr().err.count("skipped an unreadable image") == 1


def test_an_unreadable_image_is_told_by_whoever_is_asked_for_it(image_folder):
    for i in (1, 2):
        _spoil(image_folder / "train" / "cat" / f"{i}.png")
    data = find_source(str(image_folder)).load("train")
    samplers = [TrainingSampler(len(data), 12, 2, [part], seed=0) for part in (0, 1)]
    loaders = [
        training_loader(data, training_transform(GRAY, Config(**SETTINGS)), s, Config(**SETTINGS), False)
        for s in samplers
    ]
    told = [name for loader in loaders for batch in loader for name in batch.unreadable]
    assert sorted(told) == [str(image_folder / "train" / "cat" / f"{i}.png") for i in (1, 2)]


def test_paths_do_not_depend_on_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert absolute("images") == str(tmp_path / "images")
    assert absolute("fashion-mnist:files") == f"fashion-mnist:{tmp_path / 'files'}"
    assert [absolute(name) for name in ("digits", "fashion-mnist")] == ["digits", "fashion-mnist"]


def test_an_unreadable_test_image_is_left_out(image_folder):
    _spoil(image_folder / "val" / "dog" / "0.png")
    (image_folder / "val" / "dog" / "1.png").write_text("not an image")
    data = find_source(str(image_folder)).load("test")
    batches = list(evaluation_loader(data, evaluation_transform(GRAY), 4))
    assert sum(len(batch.labels) for batch in batches) == 4
    assert sum(len(batch.unreadable) for batch in batches) == 2


def test_an_unreadable_image_can_stop_the_run(image_folder):
    _spoil(image_folder / "val" / "dog" / "0.png")
    data = find_source(str(image_folder)).load("test")
    unreadable = UnreadableImages("stop")
    good, bad = evaluation_loader(data, evaluation_transform(GRAY), 3)
    unreadable.add(good)
    with pytest.raises(ValueError, match=r"cannot read the image .*dog/0\.png .*on_corrupt is 'stop'"):
        unreadable.add(bad)


def test_processes_share_the_test_images():
    data = find_source("digits").load("test")
    seen = [b.labels for p in range(3) for b in evaluation_loader(data, evaluation_transform(GRAY), 50, 0, p, 3)]
    assert torch.bincount(torch.cat(seen)).tolist() == np.bincount(data.labels).tolist()
