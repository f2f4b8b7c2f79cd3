"""A converted model is saved and loaded by transformers as any other."""

import copy
import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

import grkan

transformers = pytest.importorskip("transformers", reason="the models are transformers'")

from .models import FAMILIES, bert, convert, esm, gpt2, image, inputs, llama, output, text  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture(autouse=True)
def _quiet():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def coefficients(model):
    names = grkan.no_weight_decay(model)
    return {name: p for name, p in model.named_parameters() if name in names}


def assert_same(model, other):
    state = other.state_dict()
    assert list(model.state_dict()) == list(state)
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == state[name].dtype, name
        assert torch.equal(tensor, state[name]), name
    assert torch.equal(output(model), output(other.eval()))


def clip(family="CLIP"):
    """A model of a text and an image, each with its own tower."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    words = {**sizes, "vocab_size": 99, "max_position_embeddings": 16, "projection_dim": 16, "projection_size": 32}
    pixels = {**sizes, "image_size": 8, "patch_size": 4, "projection_dim": 16}
    config = getattr(transformers, f"{family}Config")(text_config=words, vision_config=pixels, projection_dim=16)
    return getattr(transformers, f"{family}Model")(config).eval()


@pytest.fixture(params=FAMILIES)
def saved(request, tmp_path):
    model = FAMILIES[request.param]()
    convert(model)
    model.save_pretrained(tmp_path)
    return model, tmp_path


class TestFromPretrained:
    def test_gives_the_model_that_was_saved(self, saved):
        model, path = saved
        loaded, info = type(model).from_pretrained(path, output_loading_info=True)
        assert_same(model, loaded)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert all(p.requires_grad and p.dtype == torch.float32 for p in coefficients(loaded).values())
        loaded.save_pretrained(path)
        assert_same(model, type(model).from_pretrained(path))

    def test_of_the_model_without_its_head(self, saved):
        model, path = saved
        loaded = transformers.AutoModel.from_pretrained(path).eval()
        assert torch.equal(output(model.base_model), output(loaded))
        loaded.save_pretrained(path)
        assert_same(loaded, transformers.AutoModel.from_pretrained(path))

    def test_with_a_head_on_top(self, tmp_path):
        model = bert()
        convert(model)
        model.save_pretrained(tmp_path / "base")
        headed = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
        assert_same(model, headed.bert)
        headed.save_pretrained(tmp_path / "headed")
        again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "headed")
        assert_same(headed.eval(), again)
        assert again.config.num_labels == 3

    def test_of_a_part_that_was_converted(self, tmp_path):
        for number, part in enumerate((lambda m: m.bert, lambda m: m.bert.encoder)):
            model = bert("BertForSequenceClassification")
            grkan.convert_(part(model))
            model.save_pretrained(tmp_path / str(number))
            assert_same(model, type(model).from_pretrained(tmp_path / str(number)))

    def test_of_a_part_of_what_was_converted(self, tmp_path):
        whole = bert("BertForSequenceClassification")
        convert(whole)
        wrapped = nn.Sequential(bert())
        grkan.convert_(wrapped, calibration=text()["input_ids"])
        for number, part in enumerate((whole.bert, wrapped[0])):
            part.save_pretrained(tmp_path / str(number))
            loaded = transformers.AutoModel.from_pretrained(tmp_path / str(number))
            assert len(coefficients(loaded)) == len(coefficients(part)) > 4
            assert_same(part, loaded)

    def test_after_layers_were_copied_moved_and_replaced(self, tmp_path):
        model = llama()
        convert(model)
        taller = copy.deepcopy(model)
        taller.model.layers.append(copy.deepcopy(model.model.layers[0]))
        taller.model.layers[2].self_attn.layer_idx = 2
        taller.config.num_hidden_layers = 3
        other = llama()
        other.model.layers[1] = model.model.layers[1]
        mixed = copy.deepcopy(model)
        mixed.model.layers[0] = llama().model.layers[0]
        plain = copy.deepcopy(model)
        plain.model.layers[0].mlp.act_fn = nn.SiLU()
        for number, (one, functions) in enumerate(((taller, 3), (other, 1), (mixed, 1), (plain, 1))):
            one.save_pretrained(tmp_path / str(number))
            loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / str(number))
            assert len(coefficients(loaded)) == 2 * functions
            assert_same(one, loaded)

    def test_half_of_a_converted_mlp_is_not_saved(self, tmp_path):
        model = bert()
        convert(model)
        model.encoder.layer[1].intermediate.intermediate_act_fn = nn.GELU()
        with pytest.raises(ValueError, match=r"layer\.1\.intermediate\.intermediate_act_fn has been replaced"):
            model.save_pretrained(tmp_path / "half")

    def test_of_a_model_converted_in_two_steps(self, tmp_path):
        model = bert()
        convert(model, include="*.0.*")
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path)
        convert(loaded)
        loaded.save_pretrained(tmp_path)
        assert len(loaded.config.grkan["layers"]) == 2
        assert_same(loaded, type(model).from_pretrained(tmp_path))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "auto"])
    def test_in_another_dtype(self, saved, dtype):
        model, path = saved
        loaded = type(model).from_pretrained(path, dtype=dtype)
        assert loaded.dtype == (torch.float32 if dtype == "auto" else dtype)
        own = coefficients(model)
        assert all(torch.equal(own[name], p) and p.dtype == torch.float32 for name, p in coefficients(loaded).items())
        assert (
            output(loaded, {k: v.to(loaded.dtype) if v.is_floating_point() else v for k, v in inputs(model).items()})
            .isfinite()
            .all()
        )

    def test_of_a_bfloat16_model(self, tmp_path):
        model = bert()
        convert(model)
        model.to(torch.bfloat16)
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path)
        assert loaded.dtype == torch.bfloat16
        assert_same(model, loaded)

    def test_of_a_model_that_calls_a_function(self, tmp_path):
        model = esm()
        assert [layer["layout"] for layer in convert(model).layers] == ["linear", "linear"]
        model.save_pretrained(tmp_path)
        assert_same(model, type(model).from_pretrained(tmp_path))

    def test_of_several_files(self, saved):
        model, path = saved
        model.save_pretrained(path / "parts", max_shard_size="20KB")
        assert (path / "parts" / "model.safetensors.index.json").exists()
        assert_same(model, type(model).from_pretrained(path / "parts"))

    @pytest.mark.parametrize("family", [gpt2, llama])
    def test_of_tied_weights(self, tmp_path, family):
        model = family(tie_word_embeddings=True)
        convert(model)
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path)
        assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
        assert_same(model, loaded)

    def test_an_older_transformers_gets_no_style_that_it_does_not_know(self, tmp_path, monkeypatch):
        """It would refuse the plan of a model that nobody shards."""
        model = llama()
        convert(model)
        model.save_pretrained(tmp_path)
        known, unknown = [], []
        for has_styles, plan in ((True, known), (False, unknown)):
            monkeypatch.setattr("grkan.integrations.transformers._has_styles", lambda answer=has_styles: answer)
            plan += type(model).from_pretrained(tmp_path)._tp_plan.values()
        assert "grkan_groups" in known
        assert "grkan_groups" not in unknown

    def test_of_a_composite_model_and_of_its_part(self, tmp_path):
        model = clip()
        report = grkan.convert_(model)
        assert len(report.layers) == 2
        model.save_pretrained(tmp_path)
        loaded = transformers.CLIPModel.from_pretrained(tmp_path)
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), loaded.parameters(), strict=True))
        x = torch.randn(2, 3, 8, 8)
        vision = transformers.CLIPVisionModelWithProjection.from_pretrained(tmp_path).eval()
        assert torch.equal(vision(x).image_embeds, model.get_image_features(x).pooler_output)
        loaded.save_pretrained(tmp_path / "again")
        fields = json.loads((tmp_path / "again" / "config.json").read_text())
        assert fields["grkan"] == json.loads(json.dumps(report.recipe))
        assert "grkan" not in fields["vision_config"]

    @pytest.mark.parametrize("family", ["CLIP", "Siglip"])
    def test_of_a_part_whose_weights_transformers_renames(self, tmp_path, family):
        model = clip(family)
        convert(model, calibration=[{**text(), **image()}])
        model.save_pretrained(tmp_path)
        for part, name, batch in ((model.text_model, "Text", text()), (model.vision_model, "Vision", image())):
            kind = getattr(transformers, f"{family}{name}Model")
            loaded = kind.from_pretrained(tmp_path).eval()
            assert sum(isinstance(m, grkan.GroupRational) for m in loaded.modules()) >= 2
            assert torch.equal(part(**batch)[0], loaded(**batch)[0])
            loaded.save_pretrained(tmp_path / name)
            again = kind.from_pretrained(tmp_path / name).eval()
            assert torch.equal(part(**batch)[0], again(**batch)[0])

    @pytest.mark.parametrize("family", ["CLIP", "Siglip"])
    def test_of_a_part_that_was_not_converted(self, tmp_path, family):
        model = clip(family)
        convert(model, include="vision_model.*", calibration=[{**text(), **image()}])
        model.save_pretrained(tmp_path)
        loaded = getattr(transformers, f"{family}TextModel").from_pretrained(tmp_path).eval()
        assert not coefficients(loaded)
        assert torch.equal(model.text_model(**text())[0], loaded(**text())[0])

    def test_of_a_class_with_another_head(self, tmp_path):
        torch.manual_seed(0)
        sizes = {"vocab_size": 99, "dim": 32, "n_layers": 1, "n_heads": 4, "hidden_dim": 64}
        model = transformers.DistilBertForMaskedLM(transformers.DistilBertConfig(**sizes)).eval()
        convert(model)
        assert "activation" in [layer["activation"] for layer in model.config.grkan["layers"]]  # directly in the model
        model.save_pretrained(tmp_path)
        for kind in ("DistilBertModel", "DistilBertForTokenClassification"):
            loaded = getattr(transformers, kind).from_pretrained(tmp_path).eval()
            assert torch.equal(model.distilbert(**text())[0], loaded.base_model(**text())[0])

    @pytest.mark.parametrize("head", [False, True])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_functions_that_the_given_config_leaves_out_are_refused(self, tmp_path, family, head):
        model = FAMILIES[family]()
        config = copy.deepcopy(model.config)
        convert(model)
        model.save_pretrained(tmp_path)
        kind = type(model) if head else type(model.base_model)
        for path, state in ((tmp_path, None), (None, model.state_dict())):
            with pytest.raises(ValueError, match=r"config must hold the conversion.*Load without config") as error:
                kind.from_pretrained(path, config=config, state_dict=state)
            assert model.config.grkan["layers"][0]["activation"] in str(error.value)

    def test_weights_of_the_original_with_the_config_of_the_converted_model_are_refused(self, tmp_path):
        model, plain = bert(), bert()
        plain.save_pretrained(tmp_path / "plain")
        bert("BertForSequenceClassification").save_pretrained(tmp_path / "headed")
        report = convert(model)
        for path in ("plain", "headed"):
            with pytest.raises(ValueError, match=r"config must hold no conversion.*layer\.0\.intermediate\.dense"):
                type(model).from_pretrained(tmp_path / path, config=model.config)
        with pytest.raises(ValueError, match="config must hold no conversion"):
            transformers.BertForSequenceClassification.from_pretrained(tmp_path / "plain", config=model.config)
        loaded = type(model).from_pretrained(tmp_path / "plain")
        grkan.apply_conversion_(loaded, model.config.grkan)  # as the message says
        assert len(coefficients(loaded)) == 4 * len(report.layers)

    def test_of_two_models_in_one(self, tmp_path):
        encoder = bert()
        convert(encoder)
        encoder.save_pretrained(tmp_path / "encoder")
        bert("BertLMHeadModel", is_decoder=True, add_cross_attention=True).save_pretrained(tmp_path / "decoder")
        both = transformers.EncoderDecoderModel.from_encoder_decoder_pretrained(
            tmp_path / "encoder", tmp_path / "decoder"
        )
        assert_same(encoder, both.encoder)
        both.save_pretrained(tmp_path / "both")
        loaded = transformers.EncoderDecoderModel.from_pretrained(tmp_path / "both")
        assert_same(both.encoder, loaded.encoder)
        assert sorted(both.state_dict()) == sorted(loaded.state_dict())

    def test_spread_over_devices_and_disk(self, tmp_path):
        pytest.importorskip("accelerate", reason="transformers spreads a model by it")
        model = bert()
        convert(model)
        model.save_pretrained(tmp_path)
        assert_same(model, type(model).from_pretrained(tmp_path, device_map="auto"))
        places = {"embeddings": "cpu", "encoder.layer.0": "cpu", "encoder.layer.1": "disk", "pooler": "cpu"}
        spread = type(model).from_pretrained(tmp_path, device_map=places, offload_folder=tmp_path / "offload")
        assert torch.equal(output(model), output(spread))
        spread.save_pretrained(tmp_path / "again")
        assert_same(model, type(model).from_pretrained(tmp_path / "again"))

    def test_of_a_config_and_a_state_dict(self):
        model = bert()
        convert(model)
        loaded = type(model).from_pretrained(None, config=model.config, state_dict=model.state_dict())
        assert_same(model, loaded)

    def test_coefficients_that_are_missing_have_their_initial_values(self, tmp_path):
        model, plain = llama(), llama()
        report = grkan.convert_(model, calibration=[inputs(model)])
        plain.save_pretrained(tmp_path)
        loaded, info = type(model).from_pretrained(tmp_path, config=model.config, output_loading_info=True)
        assert report.layers
        assert info["missing_keys"] >= coefficients(model).keys()
        assert_same(model, loaded)

    def test_quantised(self, tmp_path):
        pytest.importorskip("torchao", reason="the quantiser is torchao's")
        from torchao.quantization import Int8WeightOnlyConfig

        model = llama()
        convert(model)
        model.save_pretrained(tmp_path)
        quantisation = transformers.TorchAoConfig(Int8WeightOnlyConfig())
        quantised = type(model).from_pretrained(tmp_path, quantization_config=quantisation)
        difference = (output(quantised) - output(model)).norm() / output(model).norm()
        assert 0 < difference < 0.02
        quantised.save_pretrained(tmp_path / "int8")
        loaded = type(model).from_pretrained(tmp_path / "int8")
        assert torch.equal(output(quantised), output(loaded))
        assert type(loaded.model.layers[0].mlp.down_proj.weight).__name__ == "Int8Tensor"


class TestFromConfig:
    def test_gives_a_converted_model(self, saved):
        model, path = saved
        for config in (model.config, copy.deepcopy(model.config), transformers.AutoConfig.from_pretrained(path)):
            made = type(model)._from_config(config)
            assert list(made.state_dict()) == list(model.state_dict())
            output(made)

    def test_starts_with_the_functions_of_the_conversion(self):
        model = llama()
        grkan.convert_(model, calibration=[text()])
        torch.manual_seed(0)
        made = transformers.AutoModelForCausalLM.from_config(model.config)
        assert_same(model, made.eval())

    def test_the_config_that_others_share_stays(self):
        config = transformers.BertConfig(**bert().config.to_diff_dict())
        model, other = transformers.BertModel(config), transformers.BertModel(config)
        convert(model)
        assert not hasattr(config, "grkan")
        assert other.config is config
        assert model.config is not config
        assert all(module.config is model.config for module in model.modules() if hasattr(module, "config"))
        assert not coefficients(transformers.BertModel(config))

    def test_a_conversion_that_fails_leaves_the_config(self, monkeypatch):
        model = bert()
        config = model.config
        monkeypatch.setattr("grkan.convert.convert.KeptBatches.compare", None)
        with pytest.raises(TypeError):
            grkan.convert_(model)
        assert model.config is config
        assert model.encoder.config is config
        assert not hasattr(config, "grkan")


def test_it_counts_as_any_other_model(saved):
    model, path = saved
    loaded = type(model).from_pretrained(path)
    loaded.half().float().to(torch.bfloat16)
    assert {p.dtype for p in coefficients(loaded).values()} == {torch.float32}
    assert {p.dtype for p in loaded.parameters()} == {torch.float32, torch.bfloat16}
    for config in (model.config, loaded.config):
        assert not hasattr(config, "quantization_config")
    assert not getattr(loaded, "is_quantized", False)


def test_config_json_is_the_only_file_that_changes(saved):
    model, path = saved
    names = {name for name in os.listdir(path) if b"grkan" in (path / name).read_bytes()}
    assert names == {"config.json"}
    recipe = json.loads((path / "config.json").read_text())["grkan"]
    other = FAMILIES[model.config.model_type]()
    grkan.apply_conversion_(other, recipe)
    other.load_state_dict(model.state_dict())
    assert_same(model, other)


def test_a_model_that_is_not_converted_is_saved_as_ever(tmp_path):
    model = bert()
    model.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert "grkan" not in fields
    assert "quantization_config" not in fields


def test_a_model_that_has_none_of_the_modules_is_refused(tmp_path):
    model = bert()
    convert(model)
    model.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text().replace('"encoder.layer', '"encoder.block'))
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"BertModel must have a place for each function.*encoder\.layer\.0"):
        type(model).from_pretrained(tmp_path)


class Trained:
    """What a Trainer leaves behind."""

    def __init__(self, folder, start, resume=None):
        torch.manual_seed(0)
        ids = torch.randint(1, 99, (64, 8))
        data = [{"input_ids": row, "labels": row.sum() % 2} for row in ids]
        self.model = transformers.AutoModelForSequenceClassification.from_pretrained(start)
        arguments = transformers.TrainingArguments(
            str(folder),
            per_device_train_batch_size=16,
            max_steps=6,
            save_steps=3,
            learning_rate=1e-2,
            weight_decay=0.1,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            logging_strategy="no",
        )
        trainer = transformers.Trainer(self.model, arguments, train_dataset=data)
        trainer.train(resume_from_checkpoint=resume)
        self.model.eval()


def test_a_trainer_resumes_to_the_bit(tmp_path):
    pytest.importorskip("accelerate", reason="Trainer stands on it")
    start = bert("BertForSequenceClassification")
    convert(start)
    start.save_pretrained(tmp_path / "start")
    whole = Trained(tmp_path / "whole", tmp_path / "start").model
    before, after = coefficients(start), coefficients(whole)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    half = tmp_path / "whole" / "checkpoint-3"
    resumed = Trained(tmp_path / "resumed", half, str(half)).model
    assert_same(whole, resumed)
    assert_same(
        whole, transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "resumed" / "checkpoint-6")
    )


@pytest.mark.parametrize("optimiser", ["adamw_torch", "adafactor", "sgd"])
def test_a_trainer_decays_no_coefficients(tmp_path, optimiser):
    pytest.importorskip("accelerate", reason="Trainer stands on it")
    model = bert("BertForSequenceClassification")
    convert(model)
    arguments = transformers.TrainingArguments(tmp_path, use_cpu=True, report_to=[], weight_decay=0.1, optim=optimiser)
    made = transformers.Trainer(model, arguments).create_optimizer()
    decay = {id(p): group["weight_decay"] for group in made.param_groups for p in group["params"]}
    assert len(decay) == len([*model.parameters()])
    assert len(coefficients(model)) == 10  # the pooler's function is between two linear layers here
    assert {decay[id(p)] for p in coefficients(model).values()} == {0.0}
    assert decay[id(model.classifier.weight)] == decay[id(model.bert.encoder.layer[0].output.dense.weight)] == 0.1


def python(code):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)], capture_output=True, text=True, env=environment
    )


def assert_refused_without_grkan(path, kinds):
    """`kinds` are pairs of a folder in `path` and a class."""
    result = python(
        f"""
        import transformers
        for folder, kind in {kinds}:
            try:
                getattr(transformers, kind).from_pretrained({str(path)!r} + "/" + folder)
            except ValueError as error:
                print(str(error).count("quantization config"))
        """
    )
    assert result.stdout.split() == ["1"] * len(kinds), result.stderr


def test_without_grkan_loading_fails(tmp_path):
    kinds = []
    for family, make in FAMILIES.items():
        model = make()
        convert(model)
        model.save_pretrained(tmp_path / family)
        kinds += [(family, "AutoModel"), (family, type(model).__name__)]
    assert len(kinds) == 8
    assert_refused_without_grkan(tmp_path, kinds)


def test_without_grkan_loading_fails_for_a_part_and_for_a_config_saved_alone(tmp_path):
    model, other = clip(), bert()
    convert(model, calibration=[{**text(), **image()}])
    convert(other)
    model.save_pretrained(tmp_path / "whole")
    other.save_pretrained(tmp_path / "alone")
    other.config.save_pretrained(tmp_path / "alone")  # as after accelerator.save_model
    again = transformers.CLIPModel.from_pretrained(tmp_path / "whole")
    again.save_pretrained(tmp_path / "again")
    again.config.save_pretrained(tmp_path / "again")
    parts = ("CLIPTextModel", "CLIPVisionModel", "CLIPTextModelWithProjection", "CLIPModel")
    kinds = [(folder, kind) for folder in ("whole", "again") for kind in parts] + [("alone", "BertModel")]
    assert_refused_without_grkan(tmp_path, kinds)
    assert_same(other, transformers.BertModel.from_pretrained(tmp_path / "alone"))
    for folder in ("whole", "again"):
        loaded = transformers.CLIPModel.from_pretrained(tmp_path / folder)
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), loaded.parameters(), strict=True))
        for config in (loaded.config, loaded.config.text_config, loaded.config.vision_config):
            assert not hasattr(config, "quantization_config")


def test_a_config_keeps_its_quantisation(tmp_path):
    model = clip()
    convert(model, calibration=[{**text(), **image()}])
    own = {"quant_method": "fp8", "modules_to_not_convert": None}
    for config in (model.config, model.config.text_config):
        config.quantization_config = own
    model.config.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields["quantization_config"]["quantization_config"] == own
    loaded = transformers.CLIPConfig.from_pretrained(tmp_path)
    assert loaded.quantization_config == loaded.text_config.quantization_config == own
    assert not hasattr(loaded.vision_config, "quantization_config")
    assert model.config.quantization_config == own
    # Two configs that were put together, with a recipe in one of them.
    encoder = bert()
    convert(encoder)
    both = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(encoder.config, bert().config)
    both.save_pretrained(tmp_path / "both")
    fields = json.loads((tmp_path / "both" / "config.json").read_text())
    assert all("grkan" in part["quantization_config"] for part in (fields, fields["encoder"], fields["decoder"]))
    loaded = transformers.EncoderDecoderConfig.from_pretrained(tmp_path / "both")
    assert loaded.encoder.grkan["layers"]
    assert not hasattr(loaded.decoder, "grkan")
    assert not any(hasattr(part, "quantization_config") for part in (loaded, loaded.encoder, loaded.decoder))


@pytest.mark.parametrize(
    "imports",
    [
        "import transformers.modeling_utils; import grkan",
        "import grkan; import transformers; transformers.AutoConfig.from_pretrained(path)",
    ],
)
def test_whatever_is_imported_first(tmp_path, imports):
    model = llama()
    convert(model)
    model.save_pretrained(tmp_path)
    result = python(
        f"""
        import sys
        path = {str(tmp_path)!r}
        {imports}
        model = transformers.AutoModel.from_pretrained(path)
        print(sum(isinstance(m, grkan.GroupRational) for m in model.modules()))
        """
    )
    assert result.stdout.split() == ["2"], result.stderr


def test_generation_is_right_after_loading(tmp_path):
    model = llama(pad_token_id=0)
    convert(model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    wanted, given = (m.generate(**text(), max_new_tokens=4, do_sample=False) for m in (model, loaded))
    assert torch.equal(wanted, given)
    assert isinstance(loaded.model.layers[0].mlp.act_fn, nn.Module)
