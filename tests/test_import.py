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
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
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


def test_nothing_optional_is_imported_and_nothing_slow():
    stdout, _ = run(
        """
        import sys, time, torch
        before, start = set(sys.modules), time.process_time()
        import grkan
        print(time.process_time() - start)
        print(*{name.partition(".")[0] for name in sys.modules.keys() - before} - sys.stdlib_module_names)
        """
    )
    seconds, imported = stdout.splitlines()
    assert imported == "grkan"
    assert float(seconds) < 0.5  # 0.02, where timm takes 1.5


IN_A_FORK = """
import os, sys
import torch, torchvision, safetensors, huggingface_hub  # what timm needs, once for all
for imports in {variants!r}:
    if (child := os.fork()) == 0:
        try:
            exec(imports)
            import pickle, timm
            name = "kat_tiny_patch16_224"
            kat = sys.modules["grkan.models.kat"]
            assert isinstance(timm.create_model("kat_micro_patch2_8"), kat.KAT)
            assert timm.is_model(name) and timm.models.is_model_in_modules(name, ["kat"])
            assert name in timm.list_models("kat_*") and name in timm.list_models(module="kat")
            assert "kat" in timm.list_modules()
            assert timm.get_pretrained_cfg(name).architecture == name
            assert timm.get_pretrained_cfg_value(name, "classifier") == "head"
            assert timm.model_entrypoint(name) is kat.kat_tiny_patch16_224
            assert pickle.loads(pickle.dumps(kat.kat_tiny_patch16_224)) is kat.kat_tiny_patch16_224
            assert timm.is_model("grkan_converted")
            assert "timm.models" not in sys.modules["grkan.integrations.imports"]._waiting
            os.write(1, b"right\\n")
        except BaseException:
            sys.excepthook(*sys.exc_info())
        os._exit(0)
    os.waitpid(child, 0)
"""


def test_timm_knows_the_models_whatever_was_imported_first():
    pytest.importorskip("timm")
    variants = [
        "import grkan, timm",
        "import grkan; from timm import create_model",
        "import grkan; from timm.models.vision_transformer import VisionTransformer",
        "import grkan.models.kat",
        "import importlib, timm, grkan; [importlib.reload(m) for m in (grkan, timm.models, timm)]",
    ]
    stdout, stderr = run(IN_A_FORK.format(variants=variants))
    assert stderr == ""
    assert stdout == "right\n" * len(variants)


def test_a_broken_timm_breaks_nothing_and_keeps_its_own_error():
    stdout, stderr = run(
        """
        import grkan, torch
        print(grkan.GRKAN(8)(torch.ones(1, 8)).shape)
        try:
            import timm
        except RuntimeError as error:
            print(error)
        """,
        {"timm"},
        'RuntimeError("operator torchvision::nms does not exist")',
    )
    assert stdout.splitlines() == ["torch.Size([1, 8])", "operator torchvision::nms does not exist"]
    assert stderr == ""


def test_a_timm_that_lacks_what_the_models_need_warns_once(tmp_path):
    (tmp_path / "timm" / "models").mkdir(parents=True)
    (tmp_path / "timm" / "__init__.py").write_text("from .models import create_model")
    (tmp_path / "timm" / "models" / "__init__.py").write_text("create_model = print")
    stdout, stderr = run(
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import grkan, timm; timm.create_model('made')"
    )
    assert stdout.strip() == "made"
    assert stderr.count("RuntimeWarning") == 1
    assert "grkan does not work with this version of timm" in stderr


def test_public_names():
    import grkan

    for name in grkan.__all__:
        assert getattr(grkan, name) is not None
        assert name in dir(grkan)
    with pytest.raises(AttributeError, match="no attribute 'convertt_'"):
        grkan.convertt_  # noqa: B018
