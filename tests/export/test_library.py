"""The kernel in ONNX Runtime, whose table of functions `csrc/onnxruntime.cpp` knows by heart."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import grkan
from grkan.rational import cpu, dispatch
from grkan.rational.reference import FORMS, rational

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime", minversion="1.18")
helper = onnx.helper

needs_library = pytest.mark.skipif("cpu" not in dispatch.KERNELS, reason="the CPU kernel is not built")

TYPES = {torch.float32: onnx.TensorProto.FLOAT, torch.float16: onnx.TensorProto.FLOAT16}


def model(dims, dtype=torch.float32, domain="grkan", **attributes):
    """A graph of one node, for any sizes."""
    attributes = {"form": "abs_of_sum", "channel_dim": -1} | attributes
    names = ["x", "numerator", "denominator"]
    node = helper.make_node("GroupRational", names, ["y"], domain=domain, **attributes)
    types = [TYPES[dtype], onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT]
    inputs = [
        helper.make_tensor_value_info(name, kind, [f"{name}{d}" for d in range(count)])
        for name, kind, count in zip(names, types, (dims, 2, 2), strict=True)
    ]
    output = helper.make_tensor_value_info("y", TYPES[dtype], None)
    graph = helper.make_graph([node], "g", inputs, [output])
    imports = [helper.make_opsetid("", 18), helper.make_opsetid(domain, 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=8).SerializeToString()


def session(file, threads=1):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.register_custom_ops_library(str(grkan.onnx_library()))
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def run(it, *tensors):
    arrays = (t.numpy() for t in tensors)
    return torch.from_numpy(it.run(None, dict(zip(("x", "numerator", "denominator"), arrays, strict=True)))[0])


@needs_library
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_it_gives_what_pytorch_gets(form, dtype):
    """In every bit: it is the same kernel."""
    sessions = {}
    for shape, dim in [((2, 5, 24), -1), ((24,), 0), ((2, 24, 3, 4), 1), ((2, 24, 3, 4), -3), ((24, 2), 0)]:
        for groups, rows_a, rows_b, order in [
            (8, 8, 8, (5, 4)),
            (8, 1, 8, (3, 2)),
            (4, 4, 1, (7, 6)),
            (2, 2, 2, (2, 0)),
        ]:
            torch.manual_seed(groups)
            x = torch.randn(shape).to(dtype)
            a, b = torch.randn(rows_a, order[0] + 1), torch.randn(rows_b, order[1])
            key = len(shape), dim
            if key not in sessions:
                sessions[key] = session(model(len(shape), dtype, form=form, channel_dim=dim))
            y = run(sessions[key], x, a, b)
            assert torch.equal(y, grkan.group_rational(x, a, b, form=form, channel_dim=dim))


@needs_library
@pytest.mark.parametrize("form", FORMS)
def test_the_whole_range_of_float32(form):
    sizes = torch.tensor([0.0, 1e-45, 1e-38, 1e-20, 1e-3, 1.0, 1e3, 1e7, 1e15, 1e30, 3.4e38, torch.inf, torch.nan])
    x = torch.cat([sizes, -sizes]).repeat(8).view(1, -1)
    for order in ((5, 4), (4, 5), (3, 3)):
        torch.manual_seed(1)
        a, b = torch.randn(8, order[0] + 1), torch.randn(8, order[1])
        y = run(session(model(2, form=form)), x, a, b)
        wanted = rational(x.double().view(1, 8, -1), a.double(), b.double(), form).float().view_as(x)
        torch.testing.assert_close(y, wanted, rtol=2e-5, atol=2e-5, equal_nan=True)


@needs_library
@pytest.mark.filterwarnings("ignore")
def test_an_exported_file_is_computed_by_it(tmp_path):
    """Functions of several orders, too; for x so large that what the file says in standard operators is NaN."""
    for package in ("onnxscript", "timm"):
        pytest.importorskip(package)
    torch.manual_seed(0)
    parts = [grkan.GroupRational(4, "swish"), torch.nn.Linear(8, 8), grkan.GroupRational(4, "gelu", order=(7, 6))]
    model = torch.nn.Sequential(*parts).eval()
    file = grkan.export(model, tmp_path / "model.onnx", example=torch.randn(2, 8))
    x = torch.tensor([-1e20, 1e20, 3.0, -0.5]).repeat(3, 2)
    alone = onnxruntime.InferenceSession(str(file))
    feed = {alone.get_inputs()[0].name: x.numpy()}
    assert torch.from_numpy(alone.run(None, feed)[0]).isnan().any()
    y = torch.from_numpy(session(str(file)).run(None, feed)[0])
    torch.testing.assert_close(y, model(x).detach(), rtol=1e-5, atol=0)


@needs_library
def test_the_threads_of_the_session():
    """The work is cut, and the bits are those of one thread."""
    x, a, b = torch.randn(8 * 197, 768), torch.randn(8, 6), torch.randn(8, 4)
    one, many = (run(session(model(2), threads), x, a, b) for threads in (1, 4))
    assert torch.equal(one, many)
    assert torch.equal(one, grkan.group_rational(x, a, b))


@needs_library
def test_nothing_to_compute():
    a, b = torch.randn(4, 6), torch.randn(4, 4)
    it = session(model(2))
    assert run(it, torch.zeros(0, 8), a, b).shape == (0, 8)
    assert run(it, torch.zeros(3, 0), a, b).shape == (3, 0)


@needs_library
def test_the_shape_behind_a_node_is_known():
    """So that ONNX Runtime can fuse what comes there."""
    file = onnx.load_from_string(model(3))
    with_names = session(file.SerializeToString())
    (output,) = with_names.get_outputs()
    assert output.shape == ["x0", "x1", "x2"]
    assert output.type == "tensor(float)"


@needs_library
def test_mistakes_are_told():
    x, a, b = torch.randn(3, 8), torch.randn(4, 6), torch.randn(4, 4)
    for file, tensors, message in [
        (model(2), (x[:, :7].contiguous(), a, b), "divisible by the number of groups, 4; got 7"),
        (model(2, channel_dim=2), (x, a, b), "x has no dimension 2"),
        (model(2, channel_dim=-3), (x, a, b), "x has no dimension -3"),
        (model(2), (x, a[:2], b), "same number of rows"),
        (model(2), (x, a[:, :0].contiguous(), b), "numerator must have a column"),
        (model(2), (x, a[:0], b[:0]), "must have a row"),
    ]:
        with pytest.raises(Exception, match=message):
            run(session(file), *tensors)
    for file, message in [
        (model(2, form="sum"), 'form must be .*; got "sum"'),
        (model(2, form=""), 'form must be .*; got ""'),
        (model(2, form=1), "Attribute name and type"),  # ONNX Runtime's own words
        (model(2, channel_dim="x"), "Attribute name and type"),
    ]:
        with pytest.raises(Exception, match=message):
            session(file)


@needs_library
def test_it_needs_neither_pytorch_nor_grkan(tmp_path):
    """And serves several sessions, which come and go."""
    library = tmp_path / "other_name.so"
    library.write_bytes(Path(grkan.onnx_library()).read_bytes())
    (tmp_path / "model.onnx").write_bytes(model(2))
    program = """
        import sys, numpy, onnxruntime
        for _ in range(3):
            options = onnxruntime.SessionOptions()
            options.register_custom_ops_library(sys.argv[1])
            sessions = [onnxruntime.InferenceSession(sys.argv[2], options) for _ in range(2)]
            x, a, b = (numpy.full(shape, 0.5, "float32") for shape in ((3, 8), (4, 2), (4, 1)))
            ys = [it.run(None, {"x": x, "numerator": a, "denominator": b})[0] for it in sessions]
            assert all(numpy.allclose(y, 0.75 / 1.25) for y in ys), ys
            del options, sessions
        assert "torch" not in sys.modules
    """
    command = [sys.executable, "-c", "if True:" + program, str(library), str(tmp_path / "model.onnx")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr


def test_without_a_kernel_it_says_so(monkeypatch):
    monkeypatch.setattr(cpu, "LIBRARY", Path("nowhere.so"))
    with pytest.raises(RuntimeError, match=r"no compiled kernel.*pip install"):
        grkan.onnx_library()
