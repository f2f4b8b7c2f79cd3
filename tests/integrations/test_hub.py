"""Classes whose files have no place for a conversion refuse to save one."""

import json

import pytest
import torch
from torch import nn

import grkan
from grkan.integrations.hub import know_sequences

from .models import bert, text

hub = pytest.importorskip("huggingface_hub", reason="the mixin is its")


class Net(nn.Module, hub.PyTorchModelHubMixin):
    def __init__(self, width=32):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(16, width), nn.GELU(), nn.Linear(width, 16)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


def test_a_converted_model_is_not_saved_as_if_it_were_not(tmp_path):
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    model = Net(width=48)
    model.save_pretrained(tmp_path / "before")
    assert torch.equal(Net.from_pretrained(tmp_path / "before")(x), model(x))
    report = grkan.convert_(model, calibration=[x])
    with pytest.raises(ValueError, match="save_pretrained of Net, whose files have no place for the conversion"):
        model.save_pretrained(tmp_path / "after")
    assert not (tmp_path / "after").exists()
    # The way that the message names.
    other = Net(width=48)
    grkan.apply_conversion_(other, json.loads(json.dumps(report.recipe)))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))


def test_classes_that_are_no_modules_save_as_before(tmp_path):
    class Other(hub.ModelHubMixin):
        def _save_pretrained(self, save_directory):
            (save_directory / "weights").write_text("1")

    Other().save_pretrained(tmp_path)
    assert (tmp_path / "weights").read_text() == "1"


class Sequence(nn.Sequential):
    """Like sentence-transformers' models: each part writes its own files."""

    def save(self, path):
        path.mkdir()


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = bert()

    def forward(self, x):
        return self.model(**x)[0]


def dense():
    return nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))


def test_a_sequence_saves_only_conversions_inside_of_transformers_models(tmp_path):
    pytest.importorskip("transformers", reason="the encoder is its")
    know_sequences(type("Child", (Sequence,), {}))  # `save` is the parent's
    model = Sequence(Encoder(), dense())
    model.save(tmp_path / "plain")
    grkan.convert_(model, include="0.*", calibration=[(text(),)])
    model.save(tmp_path / "encoder")
    grkan.convert_(model[1], calibration=[torch.randn(64, 32)])
    with pytest.raises(ValueError, match=r"by save of Sequence, whose files have no .* conversion of 1\.1\."):
        model.save(tmp_path / "all")
    assert not (tmp_path / "all").exists()


def test_sentence_transformers_saves_no_converted_dense_modules(tmp_path):
    pytest.importorskip("sentence_transformers", reason="the modules are its")
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Dense

    parts = [Dense(32, 64, activation_function=nn.GELU()), Dense(64, 32, activation_function=nn.Identity())]
    model = SentenceTransformer(modules=parts, device="cpu")
    model.save_pretrained(str(tmp_path / "plain"), create_model_card=False)
    grkan.convert_(model)
    for save in (model.save, model.save_pretrained):
        with pytest.raises(ValueError, match=r"SentenceTransformer, .* conversion of 0\.activation_function"):
            save(str(tmp_path / "converted"))
    assert not (tmp_path / "converted").exists()
