import pytest

from grkan.train.model import describe, model_file


def test_the_best_weights_of_a_folder_come_first(tmp_path):
    with pytest.raises(ValueError, match=r"holds no best\.safetensors"):
        model_file(tmp_path)
    (tmp_path / "last.safetensors").touch()
    assert model_file(tmp_path).name == "last.safetensors"
    (tmp_path / "best.safetensors").touch()
    assert model_file(tmp_path).name == "best.safetensors"
    with pytest.raises(ValueError, match="does not exist"):
        model_file(tmp_path / "none")


def test_a_name_that_is_like_no_other_gets_ours():
    with pytest.raises(
        ValueError, match=r"unknown model 'nope'; known are kat_base_patch16_224, .* and \d+ more"
    ) as caught:
        describe("nope")
    assert len(str(caught.value)) < 300


def test_a_model_next_to_its_twin():
    counts = describe("kat_tiny_patch16_224")
    assert list(counts) == ["kat_tiny_patch16_224", "vit_tiny_patch16_224"]
    assert [round(c["paper_operations"] / 1e9, 2) for c in counts.values()] == [1.13, 1.08]
    assert counts["kat_tiny_patch16_224"]["parameters"] == 5_719_336
