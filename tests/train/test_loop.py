import json
import resource
import struct

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from grkan import GroupRational, load_model, no_weight_decay, save_model
from grkan.errors import GrkanError
from grkan.models.files import read_metadata
from grkan.train import loop
from grkan.train.checkpoint import load_state
from grkan.train.config import make_config, read_yaml
from grkan.train.loop import TrainingError, resume, train
from grkan.train.metrics import read_metrics


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of ten steps, and its folder."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    arguments = {"depth": 1, "embed_dim": 16, "num_heads": 2, "num_groups": 4}
    summary = train(make_config({"model_args": arguments, "epochs": 2, "batch_size": 256, "output": str(folder)}))
    return folder, summary


def _losses(folder):
    return [line["train_loss"] for line in read_metrics(folder / "metrics.jsonl") if "top1" not in line]


def _run(tmp_path, name, tiny, **settings):
    folder = tmp_path / name
    train(make_config(tiny, {"output": str(folder), "log_every": 1}, settings))
    return folder


def test_what_a_run_leaves(finished):
    folder, summary = finished
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "config.yaml",
        "metrics.jsonl",
        "best.safetensors",
        "last.safetensors",
        "state",
        "curves.png",
        "functions.png",
    }
    assert make_config(read_yaml(folder / "config.yaml")).shift == 1  # what suits the digits is filled in
    metadata = read_metadata(folder / "best.safetensors")
    assert metadata["classes"] == list("0123456789")
    assert metadata["preprocessing"]["input_size"] == [1, 8, 8]
    lines = read_metrics(folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == [5, 10]
    assert lines[-1]["top1"] == summary["last_top1"]
    assert lines[-1].keys() >= {"loss", "train_loss", "train_top1", "lr", "images_per_second", "seconds", "unreadable"}
    assert summary["parameters"] == sum(p.numel() for p in load_model(folder / "best.safetensors").parameters())


def test_a_model_learns(tiny, tmp_path):
    folder = tmp_path / "run"
    arguments = {
        "depth": 1,
        "embed_dim": 48,
        "num_heads": 2,
        "patch_size": 4,
        "global_pool": "avg",
        "class_token": False,
    }
    summary = train(
        make_config(
            {"model_args": arguments, "epochs": 6, "batch_size": 32, "lr": 5e-3, "shift": 0, "output": str(folder)}
        )
    )
    assert summary["top1"] > 90


def test_the_same_seed_gives_the_same_bits_and_another_does_not(tiny, tmp_path, finished):
    again = _run(tmp_path, "again", tiny, log_every=0)
    other = _run(tmp_path, "other", tiny, log_every=0, seed=1)
    ours, same, different = (load_file(f / "last.safetensors") for f in (finished[0], again, other))
    assert all(torch.equal(ours[key], same[key]) for key in ours)
    assert not torch.equal(ours["head.weight"], different["head.weight"])


def test_accumulation_changes_nothing_even_with_mixup(tiny, tmp_path):
    settings = {"mixup": 0.8, "cutmix": 1.0, "smoothing": 0.1}
    whole = _run(tmp_path, "whole", tiny, **settings)
    parts = _run(tmp_path, "parts", tiny, **settings, accumulate=4)
    assert _losses(parts) == pytest.approx(_losses(whole), rel=1e-4)


def test_the_learning_rate_warms_up_and_follows_a_cosine(tiny, tmp_path):
    folder = _run(tmp_path, "run", tiny, warmup_epochs=0.8, lr=0.01, min_lr=1e-4)
    rates = [line["lr"] for line in read_metrics(folder / "metrics.jsonl") if "top1" not in line]
    assert rates[:5] == pytest.approx([0, 0.0025, 0.005, 0.0075, 0.01])
    assert rates[7] == pytest.approx((0.01 + 1e-4) / 2)
    assert rates[5:] == sorted(rates[5:], reverse=True)


def test_coefficients_biases_norms_and_positions_do_not_decay(finished):
    state = load_state(finished[0] / "state" / "state.pt")
    groups = state["optimizer"]["param_groups"]
    model = load_model(finished[0] / "last.safetensors")
    free = {name for name, p in model.named_parameters() if p.ndim <= 1} | {"pos_embed", "cls_token"}
    sizes = {group["weight_decay"]: len(group["params"]) for group in groups}
    assert sizes == {
        0.0: len(free | no_weight_decay(model)),
        0.05: len(dict(model.named_parameters())) - len(free | no_weight_decay(model)),
    }


def test_the_average_of_the_weights_is_what_is_saved(tiny, tmp_path):
    folder = _run(tmp_path, "run", tiny, ema_decay=0.5)
    state = load_state(folder / "state" / "state.pt")
    saved = load_file(folder / "last.safetensors")
    assert torch.equal(saved["head.weight"], state["ema"]["head.weight"])
    assert not torch.equal(saved["head.weight"], state["model"]["head.weight"])


def test_coefficients_alone_can_be_trained(tiny, tmp_path, finished):
    folder = _run(tmp_path, "run", tiny, init=str(finished[0]), trainable="coefficients", lr=0.01)
    before, after = load_file(finished[0] / "best.safetensors"), load_file(folder / "last.safetensors")
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    coefficients = no_weight_decay(load_model(folder / "last.safetensors"))
    assert changed == coefficients
    assert len(coefficients) == 4


def test_everything_but_coefficients_can_be_trained(tiny, tmp_path, finished):
    folder = _run(tmp_path, "run", tiny, init=str(finished[0]), trainable="weights", lr=0.01)
    before, after = load_file(finished[0] / "best.safetensors"), load_file(folder / "last.safetensors")
    kept = {key for key in before if torch.equal(before[key], after[key]) and not key.endswith("_extra_state")}
    assert kept == no_weight_decay(load_model(folder / "last.safetensors"))


@pytest.mark.parametrize("trainable", ["coefficients", "weights"])
def test_choosing_between_coefficients_and_weights_needs_both(tiny, trainable):
    with pytest.raises(ValueError, match=f"because grkan_vit_micro.* has no rational functions; got {trainable}"):
        train(make_config({"model": "grkan_vit_micro_patch2_8", "trainable": trainable, "output": tiny["output"]}))


def test_weight_decay_reaches_coefficients_only_if_asked_for(tiny, tmp_path):
    """One step of AdamW moves a parameter by lr, and decay takes lr * decay of it, whatever the gradient."""
    settings = {"epochs": 1, "batch_size": 1024, "warmup_epochs": 0, "lr": 0.01, "weight_decay": 0.1}
    plain = load_file(_run(tmp_path, "plain", tiny, **settings) / "last.safetensors")
    decayed = load_file(_run(tmp_path, "decayed", tiny, **settings, coefficient_weight_decay=0.5) / "last.safetensors")
    coefficients = [key for key in plain if key.endswith(("numerator", "denominator"))]
    assert len(coefficients) == 4
    initial = GroupRational(4, "swish")
    torch.testing.assert_close(
        plain["blocks.0.mlp.act2.numerator"] - decayed["blocks.0.mlp.act2.numerator"],
        0.01 * 0.5 * initial.numerator.detach(),
    )
    for key in plain.keys() - set(coefficients):
        assert torch.equal(plain[key], decayed[key]), key


def test_time_goes_on_when_a_run_is_resumed(tiny, tmp_path):
    summary = train(make_config({**tiny, "epochs": 1, "output": str(tmp_path / "run")}))
    assert summary["cpu_seconds"] > 0
    again = resume(tmp_path / "run")
    assert (again["seconds"], again["cpu_seconds"]) == (summary["seconds"], summary["cpu_seconds"])


def test_fine_tuning_takes_the_files_arguments_and_those_given(tiny, tmp_path, finished):
    settings = {"init": str(finished[0]), "model": None, "model_args": {"drop_path_rate": 0.5}}
    folder = tmp_path / "run"
    train(make_config({**tiny, **settings}, {"epochs": 1}))
    recorded = read_yaml(folder / "config.yaml")
    assert recorded["model"] == "kat_micro_patch2_8"
    assert recorded["model_args"].items() >= {**tiny["model_args"], "drop_path_rate": 0.5}.items()
    assert recorded["init"] == str(finished[0] / "best.safetensors")
    ours, theirs = (read_metadata(path / "best.safetensors") for path in (folder, finished[0]))
    assert ours["arguments"] == {**theirs["arguments"], **recorded["model_args"], "num_classes": 10}


def test_fine_tuning_gets_a_new_head(tiny, tmp_path, finished, image_folder):
    settings = {"data": str(image_folder), "init": str(finished[0] / "best.safetensors"), "batch_size": 4, "workers": 0}
    folder = _run(tmp_path, "run", tiny, **settings)
    model = load_model(folder / "last.safetensors")
    assert model.num_classes == 2
    assert read_metadata(folder / "last.safetensors")["classes"] == ["cat", "dog"]
    before, after = load_file(finished[0] / "best.safetensors"), load_file(folder / "last.safetensors")
    torch.testing.assert_close(after["patch_embed.proj.weight"], before["patch_embed.proj.weight"], atol=0.02, rtol=0)


@pytest.mark.usefixtures("pictures")
def test_a_vit_of_timm_and_an_rgb_model_on_gray_images(tmp_path):
    arguments = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}
    settings = {"model": "vit_tiny_patch16_224", "model_args": arguments, "epochs": 1, "batch_size": 256}
    train(make_config(settings, {"output": str(tmp_path / "run")}))
    model = load_model(tmp_path / "run" / "best.safetensors")
    assert isinstance(model, timm.models.VisionTransformer)
    assert read_metadata(tmp_path / "run" / "best.safetensors")["preprocessing"]["input_size"] == [3, 8, 8]
    assert not (tmp_path / "run" / "functions.png").exists()


def test_a_folder_of_pngs_has_the_losses_of_the_array(tiny, tmp_path):
    """Fashion-MNIST's files and the same images as PNGs, in the same order."""
    rng = np.random.default_rng(0)
    for stem, split, count in (("train", "train", 6), ("t10k", "val", 2)):
        pixels = rng.integers(0, 256, (10 * count, 28, 28), dtype=np.uint8)
        labels = np.repeat(np.arange(10), count)
        (tmp_path / "idx").mkdir(exist_ok=True)
        for name, array in ((f"{stem}-images-idx3-ubyte", pixels), (f"{stem}-labels-idx1-ubyte", labels)):
            head = struct.pack(f">{array.ndim + 1}I", 0x0800 + array.ndim, *array.shape)
            (tmp_path / "idx" / name).write_bytes(head + array.astype(np.uint8).tobytes())
        for i, (image, label) in enumerate(zip(pixels, labels, strict=True)):
            path = tmp_path / "png" / split / str(label) / f"{i:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    settings = {"model": "kat_micro_patch4_28", "batch_size": 20, "workers": 0, "shift": 2, "hflip": 0.5}
    lines = []
    for name, data in (("a", f"fashion-mnist:{tmp_path / 'idx'}"), ("b", str(tmp_path / "png"))):
        folder = _run(tmp_path, name, tiny, **settings, data=data)
        lines.append([(line["train_loss"], line.get("loss")) for line in read_metrics(folder / "metrics.jsonl")])
    assert lines[0] == lines[1]
    assert len(lines[0]) == 8


# What goes wrong


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "kat_mikro_patch2_8"}, r"unknown model 'kat_mikro_patch2_8'; did you mean kat_micro_patch2_8"),
        (
            {"model": "kat_micro_patch2_8.in1k"},
            r"unknown model 'kat_micro_patch2_8.in1k'; did you mean kat_micro_patch2_8",
        ),
        (
            {"model": "vit_tiny_patch16_224.orig"},
            r"unknown model .*orig'; did you mean vit_tiny_patch16_224\.augreg_in21k",
        ),
        ({"model_args": {"num_grups": 4}}, r"model_args do not fit kat_micro_patch2_8: .*num_grups"),
        ({"batch_size": 2000}, r"batch_size 2000 is more than the 1442 training images of digits"),
        ({"batch_size": 255, "accumulate": 2}, r"batch_size 255 must be a multiple of processes x accumulate, 1 x 2"),
        ({"batch_size": 255, "mixup": 1.0}, r"batch_size must be a multiple of 2 x processes x accumulate, 2; got 255"),
        ({"init": "nowhere"}, r"nowhere does not exist"),
        ({"model_args": {"weight_init": "x"}}, r"model_args do not fit .*: weight_init must be '' or 'jax'.*; got 'x'"),
        ({"model_args": {"pos_embed": "x"}}, r"model_args do not fit .*: AssertionError .*pos_embed='x'\)"),
        ({"model_args": {"norm_layer": "x"}}, r"model_args do not fit .*: KeyError 'x' .*norm_layer='x'\)"),
        ({"model_args": {"num_heads": 3}}, r"model_args do not fit .*divisible by num_heads .*num_heads=3"),
        ({"model_args": {"patch_size": 0}}, r"model_args do not fit .*zero .*patch_size=0"),
        ({"model_args": {"patch_size": 16}}, r"model_args do not fit .*Kernel size.* .*patch_size=16"),
        ({"model_args": {"depth": 2, "drop_path_rate": 2}}, r"model_args do not fit .*bernoulli.*drop_path_rate=2"),
        (
            {"model_args": {"global_pool": ""}},
            r"model_args do not fit .*logits of shape \(2, 10\); got shape \(2, 17, 10\)",
        ),
        ({"shift": 9}, r"shift must be at most the size of the model's images, 8; got 9"),
        ({"auto_augment": "rand-q5"}, r"timm does not understand auto_augment 'rand-q5' \(Unknown RandAugment"),
        ({"auto_augment": "random"}, r"timm does not understand auto_augment 'random' \(AssertionError\)"),
        ({"auto_augment": "augmix-a0"}, r"timm does not understand auto_augment 'augmix-a0' \(alpha <= 0\)"),
        (
            {"model_args": {"features_only": True}},
            r"model_args must not contain features_only; weights come from --init",
        ),
        ({"model_args": {"checkpoint_path": "/etc/passwd"}}, r"model_args must not contain checkpoint_path"),
        ({"model_args": {"num_classes": 3}}, r"model_args must not contain num_classes"),
    ],
)
def test_what_does_not_fit_is_named_before_anything_is_written(tiny, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        train(make_config(tiny, settings))
    assert not (tmp_path / "run").exists()


def test_every_run_of_a_process_has_its_precision(tiny, tmp_path):
    """Accelerate keeps that of the first one, and refuses another."""
    losses = [_losses(_run(tmp_path, p, tiny, precision=p, epochs=1)) for p in ("no", "bf16")]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.01)


def test_what_accelerate_makes_of_the_environment(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "perhaps")
    with pytest.raises(GrkanError, match="Accelerate cannot start: invalid truth value perhaps"):
        train(make_config(tiny))
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_overwritten(finished, tiny):
    offered = (
        r"or choose another --output; to train its model further: grkan train --init \S+/run/last\.safetensors --epo"
    )
    with pytest.raises(ValueError, match=f"already holds a run; continue it with --resume .* {offered}"):
        train(make_config(tiny, {"output": str(finished[0])}))


def test_starting_from_another_model_is_refused(finished, tiny, tmp_path):
    for model in ("grkan_vit_micro_patch2_8", "kat_micro_patch4_28"):
        with pytest.raises(ValueError, match=f"init holds a kat_micro_patch2_8, not a {model}; .* or --init$"):
            train(make_config(tiny, {"init": str(finished[0]), "model": model}))
    save_model(timm.create_model("grkan_vit_micro_patch2_8"), tmp_path / "vit.safetensors")
    with pytest.raises(ValueError, match=r"not a kat_micro_patch2_8; .*, or convert it with --convert$"):
        train(make_config(tiny, {"init": str(tmp_path / "vit.safetensors"), "model": "kat_micro_patch2_8"}))
    with pytest.raises(
        ValueError, match=r"best\.safetensors does not fit the model: .*has shape \(1, 1, 16\) instead of \(1, 1, 32\)"
    ):
        train(make_config(tiny, {"init": str(finished[0]), "model_args": {"embed_dim": 32}}))
    assert not (tmp_path / "run").exists()


def test_a_first_step_that_fails_leaves_nothing_in_the_way(tiny, tmp_path, caplog):
    settings = {"epochs": 1, "batch_size": 1442, "warmup_epochs": 0}
    for _ in range(2):
        with pytest.raises(TrainingError, match=r"the test loss is nan at step 1 \(epoch 1\); no epoch was finished"):
            train(make_config(tiny, settings, {"lr": 1e20}))
        assert not list((tmp_path / "run").rglob("*.safetensors"))
    assert train(make_config(tiny, settings))["last_loss"] > 0
    assert caplog.text == ""  # timm thinks little of a cosine of one step


@pytest.mark.parametrize(
    ("step", "settings", "what"),
    [
        (4, {}, r"the weight head\.weight is not finite at step 10 \(epoch 2\)"),
        (1, {"save_every": 1}, r"the weight head\.weight is not finite at step 7 \(epoch 2\)"),
        (4, {"ema_decay": 0.5}, r"the averaged weight head\.weight is not finite at step 10 \(epoch 2\)"),
    ],
)
def test_weights_that_are_not_finite_are_never_saved(tiny, tmp_path, monkeypatch, step, settings, what):
    optimise = loop._Run._optimise

    def spoils(run, batches):
        loss = optimise(run, batches)
        if (run.epoch, run.step) == (1, step):
            with torch.no_grad():
                (run.model if run.ema is None else run.ema.module).head.weight[0, 0] = float("inf")
        return loss

    monkeypatch.setattr(loop._Run, "_optimise", spoils)
    with pytest.raises(TrainingError, match=what + r"; .*last\.safetensors is from the last good epoch"):
        train(make_config(tiny, settings))
    state = load_state(tmp_path / "run" / "state" / "state.pt")
    saved = load_file(tmp_path / "run" / "last.safetensors")
    assert all(t.isfinite().all() for tensors in (state["model"], saved) for t in tensors.values())
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 1


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_epoch(tiny, tmp_path, monkeypatch):
    optimise = loop._Run._optimise

    def spoiled(run, batches):
        if run.epoch == 1 and run.step == 2:
            with torch.no_grad():
                run.model.head.weight.fill_(float("nan"))
        return optimise(run, batches)

    monkeypatch.setattr(loop._Run, "_optimise", spoiled)
    with pytest.raises(TrainingError, match=r"the loss is nan at step 8 \(epoch 2\); .*last\.safetensors"):
        train(make_config(tiny))
    assert all(t.isfinite().all() for t in load_file(tmp_path / "run" / "last.safetensors").values())
    assert load_state(tmp_path / "run" / "state" / "state.pt")["epoch"] == 1


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (lambda loss, logits: loss * float("inf"), r"the loss is inf at step 3 \(epoch 1\)"),
        (
            lambda loss, logits: loss + (logits * 0).abs().sqrt().sum(),
            r"a gradient is not finite at step 3 \(epoch 1\)",
        ),
    ],
    ids=["loss", "gradient"],
)
@pytest.mark.parametrize("settings", [{}, {"clip_grad": 1.0, "accumulate": 2}], ids=["plain", "clipped"])
def test_what_is_not_finite_never_reaches_the_weights(tiny, tmp_path, monkeypatch, spoil, what, settings):
    optimise, weights = loop._Run._optimise, []

    def spoiled(run, batches):
        if run.step == 2:
            criterion = run.criterion
            run.criterion = lambda logits, targets: spoil(criterion(logits, targets), logits)
        result = optimise(run, batches)
        weights.append([parameter.detach().clone() for parameter in run.model.parameters()])
        return result

    monkeypatch.setattr(loop._Run, "_optimise", spoiled)
    with pytest.raises(TrainingError, match=what + "; no epoch was finished"):
        train(make_config(tiny, settings))
    assert len(weights) == 4  # one step more was begun
    assert all(t.isfinite().all() for tensors in weights for t in tensors)


def test_a_full_disk_is_named_and_the_last_state_stays(tiny, tmp_path, monkeypatch):
    optimise = loop._Run._optimise
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fills(run, batches):
        if run.epoch == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        return optimise(run, batches)

    monkeypatch.setattr(loop._Run, "_optimise", fills)
    try:
        with pytest.raises(OSError, match=r"cannot write .*last\.safetensors: .*File too large"):
            train(make_config(tiny))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    monkeypatch.undo()
    assert load_state(tmp_path / "run" / "state" / "state.pt")["epoch"] == 1
    assert not list((tmp_path / "run").rglob("*.tmp*"))
    assert resume(tmp_path / "run")["epochs"] == 2


def test_unreadable_images_are_counted(tiny, tmp_path, image_folder):
    (image_folder / "train" / "cat" / "1.png").write_bytes(b"")
    (image_folder / "val" / "dog" / "1.png").write_bytes(b"")
    folder = _run(tmp_path, "run", tiny, data=str(image_folder), batch_size=12, workers=0)
    assert [line["unreadable"] for line in read_metrics(folder / "metrics.jsonl") if "top1" in line] == [2, 2]
    with pytest.raises(ValueError, match=r"cannot read the image .*1\.png"):
        _run(tmp_path, "stop", tiny, data=str(image_folder), batch_size=12, workers=0, on_corrupt="stop")


@pytest.mark.parametrize("lost", [2, 6])
@pytest.mark.usefixtures("pictures")
def test_pictures_do_not_need_the_first_test_images(tiny, tmp_path, image_folder, lost, monkeypatch):
    # Where none is left, they became unreadable after the last test.
    if lost == 6:
        monkeypatch.setattr(loop, "first_images", lambda loader, unreadable: None)
    for path in sorted((image_folder / "val").rglob("*.png"))[: lost % 6]:
        path.write_bytes(b"")
    settings = {"data": str(image_folder), "batch_size": 2, "workers": 0, "epochs": 1}
    summary = train(make_config(tiny, settings))
    assert summary["unreadable"] == lost % 6
    assert (tmp_path / "run" / "functions.png").exists()


def test_no_readable_image_at_all(tiny, tmp_path, image_folder):
    for path in (image_folder / "train").rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"none of the 12 training images .* can be read"):
        _run(tmp_path, "run", tiny, data=str(image_folder), batch_size=12, workers=0)


def test_tensorboard_on_request(tiny, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = _run(tmp_path, "run", tiny, tracker="tensorboard")
    events = EventAccumulator(str(folder / "trackers" / "grkan"))
    events.Reload()
    assert [event.step for event in events.Scalars("top1")] == [5, 10]
    assert json.dumps(sorted(events.Tags()["scalars"])).count("loss") == 2


def test_trackers_get_the_settings_and_the_metrics(tiny, tmp_path, monkeypatch):
    """Of any of Accelerate's, by a stand-in for its class."""
    from accelerate import tracking
    from accelerate.utils import LoggerType

    heard = []

    class Stub(tracking.GeneralTracker):
        name = "wandb"
        requires_logging_directory = False

        def __init__(self, run_name, **arguments):
            super().__init__()
            heard.append((run_name, arguments))

        def start(self):
            pass

        tracker = None

        def store_init_configuration(self, values):
            heard.append(values)

        def log(self, values, step=None):
            heard.append((step, values))

        def finish(self):
            heard.append("end")

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", Stub)
    for module in ("grkan.train.trackers", "accelerate.tracking"):
        monkeypatch.setattr(f"{module}.get_available_trackers", lambda: [LoggerType.WANDB])
    folder = _run(tmp_path, "run", tiny, tracker="wandb", log_every=0)
    assert heard[0] == ("grkan", {"dir": str(folder), "name": "run"})
    assert heard[1]["lr"] == 1e-3
    assert json.loads(heard[1]["model_args"]) == tiny["model_args"]
    assert [step for step, _ in heard[2:4]] == [5, 10]
    assert heard[2][1].keys() >= {"train_loss", "top1", "loss", "lr"}
    assert heard[4:] == ["end"]


def test_trackers_that_are_not_there_are_named(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("grkan.train.trackers.get_available_trackers", lambda: [])
    with pytest.raises(ImportError, match="the tracker wandb needs its package; install it with: pip install wandb"):
        train(make_config(tiny, {"tracker": "wandb"}))
    with pytest.raises(ValueError, match="unknown tracker 'wandd'; did you mean wandb"):
        train(make_config(tiny, {"tracker": "tensorboard, wandd"}))
    assert not (tmp_path / "run").exists()


# Other settings


def test_a_run_stops_when_nothing_gets_better(tiny, tmp_path, capsys):
    folder = _run(tmp_path, "run", tiny, epochs=9, lr=0.0, patience=2, log_every=0)
    assert [line["epoch"] for line in read_metrics(folder / "metrics.jsonl")] == [1, 2, 3]
    assert "stopped: no epoch after 1 was better (patience)" in capsys.readouterr().out
    assert resume(folder)["best_epoch"] == 1
    assert len(read_metrics(folder / "metrics.jsonl")) == 3
    resume(folder, {"patience": 3})
    assert len(read_metrics(folder / "metrics.jsonl")) == 4


def test_patience_is_asked_after_a_test(tiny, tmp_path):
    folder = _run(tmp_path, "run", tiny, epochs=9, lr=0.0, patience=1, evaluate_every=3, log_every=0)
    assert [line["epoch"] for line in read_metrics(folder / "metrics.jsonl") if "top1" in line] == [3, 6]


def test_epochs_without_a_test_and_weights_that_are_kept(tiny, tmp_path):
    folder = _run(tmp_path, "run", tiny, epochs=5, evaluate_every=2, keep_every=2, log_every=0)
    tested = ["top1" in line for line in read_metrics(folder / "metrics.jsonl")]
    assert tested == [False, True, False, True, True]
    kept = {path.name for path in folder.glob("*.safetensors")}
    assert kept == {"best.safetensors", "last.safetensors", "epoch-2.safetensors", "epoch-4.safetensors"}


def test_compiled_checkpointed_and_channels_last_runs_learn_the_same(tiny, tmp_path, monkeypatch):
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compile_(model, backend="eager", fullgraph=True))
    plain = _losses(_run(tmp_path, "plain", tiny, epochs=1))
    for setting in ("compile", "checkpointing", "channels_last"):
        assert _losses(_run(tmp_path, setting, tiny, epochs=1, **{setting: True})) == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"loss": "bce", "optimizer": "lamb", "betas": [0.9, 0.95], "schedule": "linear"},
        {"balance": "sampling", "repeats": 2, "layer_decay": 0.7},
        {"balance": "weights", "smoothing": 0.1, "schedule": "step"},
    ],
)
def test_other_recipes_run_and_go_on_after_an_interruption(tiny, tmp_path, settings, monkeypatch):
    whole = _run(tmp_path, "whole", tiny, **settings)
    end_epoch = loop._Run._end_epoch

    def interrupted(run, result):
        end_epoch(run, result)
        if run.epoch == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(loop._Run, "_end_epoch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            _run(tmp_path, "parts", tiny, **settings)
    resume(tmp_path / "parts")
    assert _losses(tmp_path / "parts") == _losses(whole)


def test_the_precision_of_accelerate_launch(tiny, monkeypatch):
    assert loop.resolve(make_config(tiny)).precision == "no"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert loop.resolve(make_config(tiny)).precision == "bf16"
    assert loop.resolve(make_config(tiny, {"precision": "no"})).precision == "no"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(ValueError, match="precision must be no or fp16 or bf16; got 'fp8'"):
        loop.resolve(make_config(tiny))
