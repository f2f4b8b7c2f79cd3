"""`import grkan` needs torch alone, and survives whatever else is installed or broken."""

import subprocess
import sys
import textwrap

import pytest

BLOCK = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise {error}
sys.meta_path.insert(0, Blocker())
"""
MISSING = 'ModuleNotFoundError(f"No module named {name!r}", name=name)'
OPTIONAL = {
    "timm", "numpy", "scipy", "matplotlib", "safetensors", "accelerate", "rich", "yaml", "torchvision", "sklearn",
    "huggingface_hub", "tensorboard", "onnx", "onnxruntime", "onnxscript",
}  # fmt: skip


def run(code, blocked=(), error=MISSING):
    """Run code in a fresh interpreter that cannot import `blocked`; return its output."""
    script = BLOCK.format(blocked=set(blocked), error=error) + textwrap.dedent(code)
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout, result.stderr


def test_torch_alone_is_enough_to_train_a_layer():
    stdout, stderr = run(
        """
        import torch, grkan
        layer = grkan.GRKAN(16, 32, num_groups=4, act_init=("identity", "gelu"))
        layer(torch.randn(3, 16)).square().sum().backward()
        print(all(p.grad is not None for p in layer.parameters()), sorted(grkan.no_weight_decay(layer)))
        print(round(grkan.variance_gain("gelu"), 4))
        """,
        OPTIONAL,
    )
    assert stdout.splitlines() == [
        "True ['act1.denominator', 'act1.numerator', 'act2.denominator', 'act2.numerator']",
        "2.3517",
    ]
    assert "grkan" not in stderr


@pytest.mark.parametrize(
    ("blocked", "code", "extra"),
    [
        ("scipy", "grkan.fit('gelu', interval=(-4, 4))", "fit"),
        ("numpy", "grkan.fit('gelu', interval=(-4, 4))", "fit"),
        ("scipy", "grkan.GroupRational(4, 'gelu', order=(3, 2))", "fit"),
        ("scipy", "grkan.convert_(grkan.GRKAN(8))", "fit"),
        ("timm", "grkan.load_released_checkpoint({})", "models"),
        ("safetensors", "grkan.save_model(grkan.GRKAN(8), 'x.safetensors')", "models"),
        ("timm", "import grkan.models.kat", "models"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(blocked, code, extra):
    stdout, _ = run(
        f"""
        import grkan
        try:
            {code}
        except ImportError as error:
            print(error)
        """,
        {blocked},
    )
    assert blocked in stdout.lower()
    assert f'"grkan[{extra}]"' in stdout


def test_timm_is_found_when_it_is_there():
    pytest.importorskip("timm")
    stdout, _ = run("import grkan, timm; print(timm.is_model('kat_tiny_patch16_224'))")
    assert stdout.strip() == "True"


def test_a_broken_timm_warns_once_and_breaks_nothing():
    stdout, stderr = run(
        "import grkan, torch; print(grkan.GRKAN(8)(torch.ones(1, 8)).shape)",
        {"timm"},
        'RuntimeError("operator torchvision::nms does not exist")',
    )
    assert stdout.strip() == "torch.Size([1, 8])"
    assert stderr.count("RuntimeWarning") == 1
    assert "torchvision::nms" in stderr


def test_public_names():
    import grkan

    for name in grkan.__all__:
        assert getattr(grkan, name) is not None
        assert name in dir(grkan)
    with pytest.raises(AttributeError, match="no attribute 'convertt_'"):
        grkan.convertt_  # noqa: B018
