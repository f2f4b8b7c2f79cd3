"""Small models with random weights, of the families that people convert."""

import torch

import grkan


def text(vocabulary=99):
    torch.manual_seed(1)
    return {"input_ids": torch.randint(0, vocabulary, (2, 8))}


def image():
    torch.manual_seed(1)
    return {"pixel_values": torch.randn(2, 3, 8, 8)}


def bert(kind="BertModel", **config):
    import transformers as t

    torch.manual_seed(0)
    sizes = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return getattr(t, kind)(t.BertConfig(**sizes, intermediate_size=64, **config)).eval()


def gpt2(kind="GPT2LMHeadModel", **config):
    import transformers as t

    torch.manual_seed(0)
    sizes = {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
    return getattr(t, kind)(t.GPT2Config(**sizes, **config)).eval()


def llama(kind="LlamaForCausalLM", **config):
    import transformers as t

    torch.manual_seed(0)
    sizes = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return getattr(t, kind)(t.LlamaConfig(**sizes, **heads, **config)).eval()


def esm(kind="EsmModel", **config):
    """Its MLPs call a function in `forward`."""
    import transformers as t

    torch.manual_seed(0)
    sizes = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes.update(intermediate_size=64, pad_token_id=1, mask_token_id=2, max_position_embeddings=32)
    return getattr(t, kind)(t.EsmConfig(**sizes, **config)).eval()


def vit(kind="ViTForImageClassification", **config):
    import transformers as t

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    return getattr(t, kind)(t.ViTConfig(**sizes, image_size=8, patch_size=4, **config)).eval()


FAMILIES = {"bert": bert, "gpt2": gpt2, "llama": llama, "vit": vit}


def inputs(model):
    return image() if model.main_input_name == "pixel_values" else text()


def convert(model, **arguments):
    """Convert it, and change the coefficients as training would."""
    report = grkan.convert_(model, **{"calibration": [inputs(model)], **arguments})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in grkan.no_weight_decay(model):
                parameter.mul_(1.05)
    return report


def output(model, batch=None):
    with torch.no_grad():
        return model(**(batch or inputs(model)))[0]
