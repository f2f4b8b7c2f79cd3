import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from grkan.bench import deploy, rivals, suites
from grkan.bench.contest import hold
from grkan.bench.rivals import FORWARD, INFERENCE, TRAIN_STEP, TRAINING
from grkan.rational import dispatch

OPS = [
    "clone", "GELU", "SiLU", "ReLU squared", "SwiGLU", "PolyNorm", "xIELU", "powers in a loop", "powers at once",
    "Horner", "B-spline", "grkan (5,4)", "grkan (7,6)", "PolyNorm, compiled", "xIELU, compiled", "Horner, compiled",
    "B-spline, compiled",
]  # fmt: skip

pytestmark = pytest.mark.usefixtures("tiny")


def jobs(suite):
    return [tuple(contest.job.values()) for contest in suite.contests]


def test_ops():
    suite = suites.SUITES["ops"]("cpu")
    assert jobs(suite) == [
        *((shape, dtype, pass_) for dtype in ("float32", "bfloat16") for pass_ in (FORWARD, TRAINING)
          for shape in ("2x16", "1x3x8")),
        *(("1x192", "float32", f"one call, {pass_}") for pass_ in (FORWARD, TRAINING)),
    ]  # fmt: skip
    assert suite.notes == []
    for contest in suite.contests[:8]:
        result = hold(contest, rounds=2)
        assert (list(result.measurements), result.baseline) == (OPS, "GELU")
        assert all(len(m.seconds) == 2 and m.minimum > 0 for m in result.measurements.values())


def test_shapes_and_baseline_of_a_gpu():
    found = suites.ops("meta")
    assert {job[0] for job in jobs(found)} == {"128x197x192", "128x197x768", "128x197x3072", "1x192"}
    assert [contest.baseline for contest in found.contests] == ["clone"] * 12 + ["GELU"] * 2


def test_layers_and_models_of_a_gpu():
    """Larger, and under autocast; in `test_all_is_on_the_device` they are on one."""
    autocast = "autocast to bfloat16"
    assert jobs(suites.layers("cuda"))[:2] == [(192, autocast, FORWARD), (192, autocast, TRAINING)]
    names = [f"kat_{size}_patch16_224" for size in ("tiny", "base")]
    assert jobs(suites.models("cuda")) == [(n, 128, autocast, p) for n in names for p in (TRAIN_STEP, INFERENCE)]


def test_layers():
    suite = suites.SUITES["layers"]("cpu")
    assert jobs(suite) == [(width, pass_) for width in (8, 16) for pass_ in (FORWARD, TRAINING)]
    for contest in suite.contests:
        result = hold(contest, rounds=1)
        assert result.baseline == "Mlp"
        assert bool(result.facts["GRKAN"]) == (contest.job["pass"] == TRAINING)


def test_models():
    suite = suites.SUITES["models"]("cpu")
    kat = "kat_micro_patch2_8"
    assert jobs(suite) == [(kat, batch, pass_) for batch in (1, 2) for pass_ in (TRAIN_STEP, INFERENCE)]
    for contest in suite.contests:
        result = hold(contest, rounds=1)
        assert list(result.measurements) == ["grkan_vit_micro_patch2_8", "kat_micro_patch2_8"]
        assert result.baseline == "grkan_vit_micro_patch2_8"
        assert bool(result.facts["kat_micro_patch2_8"]) == (contest.job["pass"] == TRAIN_STEP)


def test_deploy(monkeypatch):
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    monkeypatch.setattr(deploy, "onnx_library", lambda: None)
    suite = suites.SUITES["deploy"]("cpu")
    assert suite.notes == ["this installation has no library for ONNX Runtime"]
    assert jobs(suite) == [("ONNX Runtime", "float32", 2)]
    result = hold(suite.contests[0], rounds=1)
    assert list(result.measurements) == ["grkan_vit_micro_patch2_8", "kat_micro_patch2_8"]
    for facts in result.facts.values():
        assert 0 < facts["difference"] < 1e-5
        assert 100 < facts["nodes"] < 200


def test_deploy_leaves_out_what_is_not_there(monkeypatch):
    monkeypatch.setattr(deploy, "missing", lambda runtime: None if runtime[0] == deploy.EXECUTORCH else "a thing")
    suite = suites.deploy()
    assert jobs(suite) == [("ExecuTorch", "float32", 1)]
    assert "ONNX Runtime int8 is left out: it needs a thing" in suite.notes
    assert not any(note.startswith("OpenVINO compiles") for note in suite.notes)
    monkeypatch.setattr(deploy, "missing", lambda runtime: None)
    assert any(note.startswith("OpenVINO compiles") for note in suites.deploy().notes)
    with pytest.raises(ValueError, match="device must be 'cpu' for deploy; got 'cuda'"):
        suites.deploy("cuda")


def test_the_packages_of_a_runtime(monkeypatch):
    found = {"onnx", "onnxscript"}
    monkeypatch.setattr(deploy, "find_spec", lambda package: package if package in found else None)
    monkeypatch.setattr(deploy.shutil, "which", lambda program: None)
    assert deploy.missing((deploy.ONNX_RUNTIME, deploy.INT8)) == "onnxruntime"
    assert deploy.missing((deploy.OPENVINO, deploy.FLOAT32)) == "openvino"
    assert deploy.missing((deploy.AOT_INDUCTOR, deploy.FLOAT32)) == "a C++ compiler"


@pytest.mark.parametrize("suite", [name for name in suites.SUITES if name != "deploy"])
def test_all_is_on_the_device(suite):
    """On the meta device, as there may be no other: what meets a tensor of the CPU raises, or is seen."""

    class Devices(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            result = function(*arguments, **(options or {}))
            seen.update(t.device.type for t in tree_leaves(result) if isinstance(t, torch.Tensor))
            return result

    for contest in suites.SUITES[suite]("meta").contests:
        for name, rival in contest.enter().items():
            seen = set()
            with Devices():
                rival.call()
            # AdamW counts its steps on the CPU.
            assert seen - ({"cpu"} if contest.job["pass"] == TRAIN_STEP else set()) == {"meta"}, name


def test_without_the_kernel(monkeypatch):
    monkeypatch.setattr(dispatch, "KERNELS", {})
    monkeypatch.setattr(dispatch, "_noticed", {"cpu"})
    suite = suites.ops(shapes=((2, 16),), dtypes=(torch.float32,))
    assert "no native kernel: grkan is plain PyTorch here" in suite.notes[0]
    for contest in suite.contests:
        for rival in contest.enter().values():
            rival.call()


def test_without_a_compiler(monkeypatch):
    def fail(function):
        raise RuntimeError("g++ is not there\nand more")

    monkeypatch.setattr(rivals, "_compiled", fail)
    suite = suites.ops(shapes=((2, 16),), dtypes=(torch.float32,))
    assert list(suite.contests[0].enter()) == OPS[:13]
    assert len(suite.notes) == 1
    assert suite.notes[0].endswith("the compiled rivals are left out: g++ is not there")
