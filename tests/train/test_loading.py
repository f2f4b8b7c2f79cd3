import numpy as np
import pytest
import torch
from PIL import Image

from grkan.train.config import Config
from grkan.train.data import ImageData, find_source
from grkan.train.loading import (
    TrainingSampler,
    UnreadableImages,
    evaluation_loader,
    evaluation_transform,
    training_loader,
    training_transform,
)
from grkan.train.randomness import seeded

GRAY = {"input_size": [1, 8, 8], "mean": [0.5], "std": [0.25], "interpolation": "bicubic", "crop_pct": 1.0}
RGB = {**GRAY, "input_size": [3, 8, 8], "mean": [0.5] * 3, "std": [0.25] * 3}
SETTINGS = {"shift": 1, "hflip": 0.5, "color_jitter": 0.0, "workers": 0}


def _indices(sampler):
    return [[index for _, index in part] for part in sampler]


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


def test_a_folder_of_pngs_trains_as_the_same_array(image_folder):
    """The same images in the same order give the same batches, to the bit."""
    files = find_source(str(image_folder)).load("train")
    pixels = np.stack([np.asarray(files.open(i)) for i in range(len(files))])
    arrays = ImageData(pixels, files.labels, files.classes)
    for a, b in zip(_batches(files, 0), _batches(arrays, 0), strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)


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
