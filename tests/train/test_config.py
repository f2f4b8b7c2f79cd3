import argparse
import dataclasses
import json
from pathlib import Path

import pytest

from grkan.train.config import (
    Config,
    add_training_options,
    make_config,
    merge,
    nearest,
    parse_assignment,
    read_yaml,
    settings_table,
    to_dict,
    to_yaml,
)

CONFIGS = Path(__file__).parents[2] / "configs"


def test_later_settings_override_and_model_args_are_merged():
    config = make_config(
        {"epochs": 5, "lr": 0.1, "model_args": {"depth": 2, "num_groups": 4}}, {"lr": 0.2, "model_args": {"depth": 3}}
    )
    assert (config.epochs, config.lr) == (5, 0.2)
    assert config.model_args == {"depth": 3, "num_groups": 4}


def test_yaml_round_trip(tmp_path):
    config = Config(lr=3e-4, crop_scale=(0.5, 1.0), precision="no", ema_decay=None, model_args={"order": [7, 6]})
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    assert make_config(read_yaml(tmp_path / "c.yaml")) == config


@pytest.mark.parametrize(
    ("key", "value", "converted"),
    [("lr", "1.5", 1.5), ("lr", 1, 1.0), ("precision", False, "no"), ("shift", None, None)],
)
def test_values_as_yaml_reads_them(key, value, converted):
    result = getattr(make_config({key: value}), key)
    assert result == converted
    assert type(result) is type(converted)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"epochs": 0}, ValueError, r"epochs must be at least 1; got 0"),
        ({"epochs": 2.5}, TypeError, r"epochs must be a whole number; got 2.5"),
        ({"epochs": True}, TypeError, r"epochs must be a whole number; got True"),
        ({"lr": "fast"}, TypeError, r"lr must be a number; got 'fast'"),
        ({"lr": float("nan")}, ValueError, r"lr must be a finite number; got nan"),
        ({"lr": float("inf")}, ValueError, r"lr must be a finite number; got inf"),
        ({"mixup": 1e-320}, ValueError, r"mixup must be 0 or at least 2.2e-308 in absolute value; got 1e-320"),
        ({"color_jitter": 1e300}, ValueError, r"color_jitter must be in \[0, 100\]; got 1e\+300"),
        ({"mixup": "1e400"}, ValueError, r"mixup must be a finite number; got inf"),
        ({"lr": 10**400}, TypeError, r"lr must be a number; got 10+"),
        ({"clip_grad": 0}, ValueError, r"clip_grad must be more than 0; got 0"),
        ({"smoothing": 1}, ValueError, r"smoothing must be in \[0, 1\); got 1.0"),
        ({"ema_decay": 1}, ValueError, r"ema_decay must be in \[0, 1\); got 1.0"),
        ({"epochs": 10**400}, ValueError, r"epochs must be less than 2\^63; got 10+"),
        ({"output": ""}, ValueError, r"output must be a non-empty string without null characters; got ''"),
        ({"data": "a\0b"}, ValueError, r"data must be a non-empty string without null characters; got 'a\\x00b'"),
        ({"model_args": {1: 2}}, TypeError, r"the keys of model_args must be strings; got 1"),
        ({"model_args": {"depth": {3}}}, TypeError, r"model_args.depth must consist of numbers, .*; got \{3\}"),
        ({"hflip": 2}, ValueError, r"hflip must be in \[0, 1\]; got 2"),
        ({"trainable": "some"}, ValueError, r"trainable must be all or coefficients or weights; got 'some'"),
        ({"warmup_epochs": 3, "epochs": 3}, ValueError, r"warmup_epochs must be less than epochs, 3; got 3"),
        ({"lr": 1e-6, "min_lr": 1e-5}, ValueError, r"min_lr must not exceed lr"),
        ({"crop_scale": [1.0]}, TypeError, r"crop_scale must be 2 numbers"),
        ({"crop_scale": [0.9, 0.1]}, ValueError, r"crop_scale must be \(low, high\)"),
        ({"crop_scale": [0, 1]}, ValueError, r"crop_scale must be in \(0, 1\]; got 0"),
        ({"betas": [0.9, 1.0]}, ValueError, r"betas must be in \[0, 1\); got 1.0"),
        ({"evaluate_every": 3, "epochs": 2}, ValueError, r"evaluate_every must not exceed epochs, 2; got 3"),
        ({"batchsize": 8}, ValueError, r"unknown setting 'batchsize'; did you mean batch_size"),
    ],
)
def test_bad_settings_are_named(settings, error, message):
    with pytest.raises(error, match=message):
        make_config(settings)


def _given(*arguments):
    parser = argparse.ArgumentParser()
    add_training_options(parser)
    return merge(*parser.parse_args(arguments).settings)


def test_every_setting_has_an_option_and_a_meaning(capsys):
    """But model_args, whose parts `--set` reaches."""
    for f in dataclasses.fields(Config):
        assert f.metadata["meaning"]
        if f.name != "model_args":
            value = to_dict(Config())[f.name] or 1
            text = value if isinstance(value, str) else json.dumps(value)
            given = _given(f"--{f.name.replace('_', '-')}", text)[f.name]
            assert given in (value, str(value))
    with pytest.raises(SystemExit):
        _given("--help")
    assert "the highest learning rate (0.001)" in " ".join(capsys.readouterr().out.split())


def test_the_last_of_options_counts():
    assert _given("--lr=1", "--set=lr=2", "--lr=3") == {"lr": 3}
    assert _given("--set=model_args={depth: 1}", "--set", "model_args.num_heads=2") == {
        "model_args": {"depth": 1, "num_heads": 2}
    }
    assert _given("--compile") == {"compile": True}
    assert _given("--data=7", "--precision=no") == {"data": "7", "precision": "no"}


def test_assignments_are_read_as_yaml():
    assert parse_assignment("lr=1.5") == {"lr": 1.5}
    assert parse_assignment("model_args.order=[7, 6]") == {"model_args": {"order": [7, 6]}}
    assert parse_assignment("compile=true") == {"compile": True}


@pytest.mark.parametrize("text", ["1e-5", "-2E5", "+1.5e3", "1.e0"])
def test_a_number_with_an_exponent_is_one(text):
    """PyYAML takes it for a string, and timm would get it as one."""
    assert parse_assignment(f"model_args.init_values={text}") == {"model_args": {"init_values": float(text)}}


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("lr", "must be key=value"),
        ("lr=[", "not a YAML value"),
        ("lr=!!int ''", "not a YAML value"),
        ("lr=2020-13-01", "not a YAML value"),
        ("lr=" + "[" * 5000, "not a YAML value .it is nested too deeply"),
        ("model_args={depth: 1, depth: 2}", r"not a YAML value \(depth is set twice\)"),
        ("lr.x=1", "only model_args may have a dotted key; got 'lr.x=1'"),
        ("lx=1", "did you mean lr"),
    ],
)
def test_bad_assignments_are_named(assignment, message):
    with pytest.raises(ValueError, match=message):
        parse_assignment(assignment)


@pytest.mark.parametrize(
    "content",
    [
        "a: [",
        "lr: 1\nlr: 2",
        "model_args: {depth: 1, depth: 2}",
        "- 1\n- 2",
        "\udc80".encode("utf-8", "surrogateescape"),
    ],
)
def test_bad_yaml_is_named(tmp_path, content):
    path = tmp_path / "c.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=r"c\.yaml (is not valid YAML|must hold a mapping)"):
        read_yaml(path)


def test_nearest_names_come_first():
    assert nearest("kat_tini", ["vit", "kat_tiny", "resnet"]) == "did you mean kat_tiny?"


def test_of_many_names_a_few_are_shown():
    assert nearest("?", ["vit", "kat"]) == "known names: vit, kat"
    assert nearest("?", ["vit", "kat", "resnet"], shown=1) == "known names: vit and 2 more"


@pytest.mark.parametrize(("name", "drop_path"), [("kat_tiny", 0.1), ("kat_small", 0.1), ("kat_base", 0.4)])
def test_the_papers_recipe(name, drop_path):
    config = make_config(read_yaml(CONFIGS / f"{name}.yaml"))
    assert config.model == f"{name}_patch16_224"
    assert config.model_args == {"drop_path_rate": drop_path, "attn_init": "mimetic"}
    assert (config.lr, config.weight_decay, config.batch_size, config.epochs) == (1e-3, 0.05, 1024, 300)
    assert (config.warmup_epochs, config.mixup, config.cutmix, config.random_erasing) == (5, 0.8, 1.0, 0.25)
    assert (config.smoothing, config.ema_decay, config.auto_augment) == (0.1, 0.9999, "rand-m9-mstd0.5-inc1")


def test_the_page_of_the_settings_is_current():
    page = (CONFIGS.parent / "docs" / "settings.md").read_text(encoding="utf-8")
    assert page.endswith("\n\n" + settings_table()), "put what grkan.train.config.settings_table() gives at its end"


def test_the_table_has_every_setting_with_its_range():
    rows = {line.split("`")[1]: line for line in settings_table().splitlines()[2:]}
    assert list(rows) == [f.name for f in dataclasses.fields(Config)]
    assert rows["lr"] == "| `lr` | the highest learning rate | `0.001` | a number, at least 0 |"
    assert rows["betas"].endswith("|  | two numbers, each in [0, 1) |")
    assert rows["schedule"].endswith("| `cosine` | `cosine`, `linear`, `step`, `constant` |")
    assert "*(may change on resume)*" in rows["workers"]
