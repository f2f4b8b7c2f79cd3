"""The record about a model in a model file: what is written reads back, and what is damaged is named."""

import json

import pytest
import timm
from torch import nn

import grkan
from grkan.models.metadata import FORMAT_VERSION, Preprocessing, describe_model, parse_metadata

PREPROCESSING: Preprocessing = {
    "input_size": [1, 8, 8],
    "mean": [0.5],
    "std": [0.25],
    "interpolation": "bicubic",
    "crop_pct": 1.0,
    "crop_mode": "center",
}
COMPLETE = {
    "format_version": FORMAT_VERSION,
    "grkan_version": "0.2.0",
    "model": "kat_micro_patch2_8",
    "arguments": {"num_classes": 2},
    "classes": ["zero", "one"],
    "preprocessing": PREPROCESSING,
    "forms": {"blocks.0.mlp.act1": "abs_of_sum"},
    "conversion": None,
}


@pytest.mark.parametrize(
    "changed", [{}, {"model": None, "classes": None, "preprocessing": None}, {"conversion": {"layers": []}, "new": 1}]
)
def test_a_complete_record(changed):
    assert parse_metadata(json.dumps({**COMPLETE, **changed})) == {**COMPLETE, **changed}


def test_a_description_reads_back():
    model = timm.create_model("kat_micro_patch2_8", order=(7, 6), num_classes=2)
    described = describe_model(model, ("zero", "one"), None, None)
    assert parse_metadata(json.dumps(described)) == described
    assert described["arguments"]["order"] == [7, 6]
    assert described["preprocessing"]["input_size"] == [1, 8, 8]


def test_preprocessing_may_say_more_or_less():
    given = {"mean": (0.5,), "test_time_flip": True, "crop_pct": None}
    assert describe_model(nn.Linear(2, 2), None, given, None)["preprocessing"] == {**given, "mean": [0.5]}


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "its metadata is not JSON"),
        ('{"format_version": 1', "its metadata is not JSON"),
        ("[" * 100_000, "its metadata is not JSON"),
        ('{"format_version": ' + "1" * 5_000 + "}", "its metadata is not JSON"),
        ("[]", r"its metadata must be an object; got \[\]"),
        ("{}", "its metadata lack format_version, grkan_version, model, arguments, classes"),
        (json.dumps({k: v for k, v in COMPLETE.items() if k != "forms"}), "its metadata lack forms$"),
    ],
)
def test_what_is_no_record(text, match):
    with pytest.raises(grkan.errors.GrkanValueError, match=f"^is damaged: {match}"):
        parse_metadata(text)


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        ("format_version", "1", "a whole number, at least 1; got '1'"),
        ("format_version", True, "a whole number, at least 1; got True"),
        ("format_version", 0, "a whole number, at least 1; got 0"),
        ("grkan_version", None, "a string; got None"),
        ("model", 3, "a string or null; got 3"),
        ("arguments", [], r"an object; got \[\]"),
        ("classes", "ab", "a list of strings, or null; got 'ab'"),
        ("classes", [1], r"a list of strings, or null; got \[1\]"),
        ("preprocessing", [], r"an object or null; got \[\]"),
        ("forms", None, "an object of strings; got None"),
        ("forms", {"act": 1}, "an object of strings; got {'act': 1}"),
        ("conversion", "recipe", "an object or null; got 'recipe'"),
    ],
)
def test_a_field_that_is_wrong(field, value, match):
    with pytest.raises(ValueError, match=f"^is damaged: {field} must be {match}$"):
        parse_metadata(json.dumps({**COMPLETE, field: value}))


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        ("input_size", 8, "three positive whole numbers; got 8"),
        ("input_size", [8, 8], "three positive whole numbers"),
        ("input_size", [1, 8, 0], "three positive whole numbers"),
        ("mean", 0.5, "a list of numbers; got 0.5"),
        ("std", [], "a list of numbers"),
        ("std", ["0.5"], "a list of numbers"),
        ("interpolation", 3, "a string; got 3"),
        ("crop_pct", 0, "a positive number or null; got 0"),
        ("crop_mode", 1, "a string or null; got 1"),
    ],
)
def test_preprocessing_that_is_wrong_is_neither_read_nor_written(field, value, match):
    with pytest.raises(ValueError, match=f"^is damaged: {field} must be {match}"):
        parse_metadata(json.dumps({**COMPLETE, "preprocessing": {**PREPROCESSING, field: value}}))
    with pytest.raises(ValueError, match=f"^preprocessing: {field} must be {match}"):
        describe_model(nn.Linear(2, 2), None, {**PREPROCESSING, field: value}, None)


def test_a_newer_version_is_told_before_its_fields_are_read():
    with pytest.raises(ValueError, match=f"^has format {FORMAT_VERSION + 1}, .*: upgrade grkan"):
        parse_metadata(json.dumps({"format_version": FORMAT_VERSION + 1, "classes": {}}))


def test_an_argument_that_holds_itself():
    endless = []
    endless.append(endless)
    with pytest.raises(TypeError, match="depth must be valid JSON"):
        describe_model(nn.Linear(2, 2), None, None, {"depth": endless})
