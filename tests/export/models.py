"""Small models with coefficients as training would leave them."""

import torch

SIZES = {"depth": 1, "embed_dim": 32, "num_heads": 2}


def changed(module):
    """Every group a function of its own, and a head that is not zero."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "numerator" in name or "denominator" in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
            if name == "head.weight":
                torch.nn.init.normal_(parameter, std=0.05)
    return module.eval()


def kat(**arguments):
    import timm

    torch.manual_seed(0)
    return changed(timm.create_model("kat_micro_patch2_8", **SIZES, **arguments))


def images(count=2, size=(8, 8), seed=1):
    return torch.randn(count, 1, *size, generator=torch.Generator().manual_seed(seed))


def agree(actual, expected, tolerance=1e-5):
    actual = torch.as_tensor(actual)
    assert actual.shape == expected.shape
    assert (actual.double() - expected.double()).abs().max() <= tolerance * expected.abs().max()
