"""Classes whose files have no place for a conversion refuse to save one."""

import json

import pytest
import torch
from torch import nn

import grkan

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
