"""An ONNX file computes what the model does, in any runtime, for any batch; and it says what it is."""

import importlib.util
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import grkan

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytest.importorskip("timm")

from grkan.export import door  # noqa: E402
from grkan.export import onnx as exporter  # noqa: E402


def load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


HERE = Path(__file__).parent
models = load("export_models", HERE / "models.py")
text_models = load("text_models", HERE.parent / "integrations" / "models.py")
agree, images, kat = models.agree, models.images, models.kat


def layer(**arguments):
    """For what does not depend on the model: it is traced in half the time."""
    torch.manual_seed(0)
    return models.changed(grkan.GRKAN(16, 64, **arguments))


ROWS = torch.randn(2, 16, generator=torch.Generator().manual_seed(1))


def run(path, *inputs):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    return session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})


def functions(proto):
    return [node for node in proto.graph.node if (node.domain, node.op_type) == ("grkan", "GroupRational")]


def sizes(value):
    return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    model = kat()
    model.grkan_metadata = {"classes": [f"digit {i}" for i in range(10)], "preprocessing": None}
    return model, grkan.export(model, tmp_path_factory.mktemp("onnx") / "kat.onnx")


@torch.no_grad()
def test_the_file_alone_computes_the_same_for_any_batch(exported):
    model, path = exported
    for count in (1, 2, 5):
        x = images(count, seed=count)
        agree(run(path, x)[0], model(x))


def test_one_node_for_each_function_and_its_meaning_in_the_file(exported):
    model, path = exported
    proto = onnx.load(path)
    onnx.checker.check_model(proto, full_check=True)
    assert len(functions(proto)) == 2
    assert [(f.domain, f.name, f.overload) for f in proto.functions] == [("grkan", "GroupRational", "")]
    assert {node.domain for node in proto.functions[0].node} == {""}
    held = {tensor.name: torch.tensor(onnx.numpy_helper.to_array(tensor)) for tensor in proto.graph.initializer}
    for node, name in zip(functions(proto), ("blocks.0.mlp.act1", "blocks.0.mlp.act2"), strict=True):
        assert node.input[1:] == [f"{name}.numerator", f"{name}.denominator"]
        for parameter, rows in zip(node.input[1:], model.get_submodule(name).coefficients(), strict=True):
            assert torch.equal(held[parameter], rows.detach())
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert attributes == {"form": b"abs_of_sum", "channel_dim": -1}


def test_coefficients_keep_their_names_where_they_are_the_same(tmp_path):
    timm = pytest.importorskip("timm")
    model = timm.create_model("kat_micro_patch2_8", **(models.SIZES | {"depth": 2}))
    proto = onnx.load(grkan.export(model, tmp_path / "start.onnx"))
    names = {tensor.name for tensor in proto.graph.initializer}
    assert {name for name, _ in model.named_parameters() if name.endswith("ator")} <= names


def test_the_file_says_what_it_is(exported):
    _, path = exported
    proto = onnx.load(path)
    properties = {entry.key: entry.value for entry in proto.metadata_props}
    assert json.loads(properties["classes"]) == [f"digit {i}" for i in range(10)]
    assert json.loads(properties["preprocessing"])["input_size"] == [1, 8, 8]
    assert properties["model"] == "kat_micro_patch2_8"
    assert properties["grkan_version"] == grkan.__version__ == proto.producer_version
    assert properties["torch_version"] == torch.__version__
    assert proto.opset_import[0].version >= 18
    assert str(HERE).encode() not in path.read_bytes()  # where the code lies is nobody's business
    assert ".py" not in str([node.metadata_props for node in proto.graph.node])


def test_as_few_nodes_as_for_the_vision_transformer(exported, tmp_path):
    import timm

    _, path = exported
    vit = timm.create_model("grkan_vit_micro_patch2_8", **models.SIZES)
    ours, theirs = (
        Counter(n.op_type for n in onnx.load(p).graph.node) for p in (path, grkan.export(vit, tmp_path / "v"))
    )
    del ours["GroupRational"]
    assert ours.total() <= theirs.total() - 1  # GELU
    assert ours["Transpose"] == 4  # of patches, queries with keys and values, keys, and what attention gives
    assert ours["Concat"] == 2


@torch.no_grad()
def test_onnx_itself_understands_the_file(exported):
    reference = pytest.importorskip("onnx.reference")
    model, path = exported
    x = images(3)
    (y,) = reference.ReferenceEvaluator(str(path)).run(None, {"x": x.numpy()})
    agree(y, model(x))


def test_the_file_runs_without_grkan_and_torch(exported, tmp_path):
    model, path = exported
    x = images(3)
    code = f"""
import sys
sys.modules["grkan"] = sys.modules["torch"] = None
import numpy as np, onnxruntime
session = onnxruntime.InferenceSession({str(path)!r})
x, y = np.load({str(tmp_path / "x.npy")!r}), np.load({str(tmp_path / "y.npy")!r})
assert abs(session.run(None, {{"x": x}})[0] - y).max() <= 1e-5 * abs(y).max()
"""
    np.save(tmp_path / "x.npy", x.numpy())
    np.save(tmp_path / "y.npy", model(x).detach().numpy())
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@torch.no_grad()
@pytest.mark.parametrize("inline", [False, True])
def test_any_image_size_where_the_model_takes_it(tmp_path, inline):
    model = kat(dynamic_img_size=True)
    path = grkan.export(model, tmp_path / "sizes.onnx", inline=inline)
    assert sizes(onnx.load(path).graph.input[0]) == ["batch", 1, "height", "width"]
    for size in ((8, 8), (8, 12), (4, 6)):
        x = images(3, size)
        agree(run(path, x)[0], model(x), 1e-4)


@torch.no_grad()
def test_inline_there_are_no_functions(tmp_path):
    model = layer(form="sum_of_abs", share_numerator=True, order=(3, 2))
    proto = onnx.load(grkan.export(model, tmp_path / "inline.onnx", example=ROWS, inline=True))
    assert not proto.functions
    assert {node.domain for node in proto.graph.node} == {""}
    agree(run(tmp_path / "inline.onnx", ROWS)[0], model(ROWS))


@torch.no_grad()
def test_fixed_sizes(tmp_path):
    model = layer()
    path = grkan.export(model, tmp_path / "two.onnx", example=ROWS, dynamic=False)
    assert sizes(onnx.load(path).graph.input[0]) == [2, 16]
    agree(run(path, ROWS)[0], model(ROWS))


@torch.no_grad()
def test_half_precision(tmp_path):
    model = kat()
    expected = model(images(3))
    path = grkan.export(model.half(), tmp_path / "half.onnx")
    proto = onnx.load(path)
    half = onnx.TensorProto.FLOAT16
    assert proto.graph.input[0].type.tensor_type.elem_type == half
    kinds = {tensor.name: tensor.data_type for tensor in proto.graph.initializer}
    assert kinds["patch_embed.proj.weight"] == half
    assert kinds["blocks.0.mlp.act1.numerator"] == onnx.TensorProto.FLOAT
    agree(run(path, images(3).half())[0], expected, 2e-2)


@torch.no_grad()
def test_int8(tmp_path, exported):
    model, whole = exported
    path = grkan.export(model, tmp_path / "int8.onnx", int8=True)
    proto = onnx.load(path)
    assert Counter(node.op_type for node in proto.graph.node)["MatMulInteger"] == 5  # with the head
    assert len(functions(proto)) == 2
    assert {entry.key for entry in onnx.load(whole).metadata_props} <= {entry.key for entry in proto.metadata_props}
    assert list(tmp_path.iterdir()) == [path]
    agree(run(path, images(4))[0], model(images(4)), 0.1)


@torch.no_grad()
@pytest.mark.parametrize("int8", [False, True])
def test_weights_of_two_gibibytes_lie_beside_the_file(tmp_path, monkeypatch, int8):
    monkeypatch.setattr(exporter, "_LARGE", 1000)
    model = layer()
    path = grkan.export(model, tmp_path / "large.onnx", example=ROWS, int8=int8)
    assert {file.name for file in tmp_path.iterdir()} == {"large.onnx", "large.onnx.data"}
    assert (tmp_path / "large.onnx.data").stat().st_size > 1000
    assert len({file.stat().st_mode for file in tmp_path.iterdir()}) == 1
    agree(run(path, ROWS)[0], model(ROWS), 0.1 if int8 else 1e-5)


class Mixed(torch.nn.Module):
    """Functions of two orders and two forms, of channels in two places."""

    def __init__(self):
        super().__init__()
        self.first = grkan.GRKAN(8, 16, use_conv=True, num_groups=4)
        self.second = grkan.RationalLinear(8, 6, num_groups=2, order=(7, 6), form="sum_of_abs")
        self.act = grkan.GroupRational(3, channel_dim=1, init=([0.5, 1.0, 0.25], []), order=(2, 0))
        self.constant = grkan.GroupRational(2, ([2.0], []), (0, 0))

    def forward(self, images, scale):
        x = self.second(self.first(images).flatten(2).mT)
        return {"twice": self.act(self.act(x.mT)) * scale, "constant": self.constant(x)}


@torch.no_grad()
def test_functions_of_several_kinds_in_one_file(tmp_path):
    model = models.changed(Mixed())
    inputs = {"images": torch.randn(2, 8, 3, 4), "scale": torch.rand(2, 1, 1)}
    path = grkan.export(model, tmp_path / "mixed.onnx", example=inputs)
    proto = onnx.load(path)
    assert len(functions(proto)) == 6
    kinds = [a.i for node in functions(proto) for a in node.attribute if a.name == "kind"]
    assert len(kinds) == 6
    assert set(kinds) == {0, 1, 2, 3}
    assert len(proto.functions) == 1  # old versions of ONNX Runtime confuse overloads
    assert [node.input[1] for node in functions(proto)].count("act.numerator") == 2
    assert [value.name for value in proto.graph.output] == ["twice", "constant"]
    inputs = {"images": torch.randn(5, 8, 3, 4), "scale": torch.rand(5, 1, 1)}
    for found, expected in zip(run(path, *inputs.values()), model(**inputs).values(), strict=True):
        agree(found, expected)


@torch.no_grad()
def test_a_function_alone(tmp_path):
    act = models.changed(grkan.GroupRational(4))
    path = grkan.export(act, tmp_path / "act.onnx", example=torch.randn(2, 8))
    assert onnx.load(path).graph.node[0].input[1:] == ["numerator", "denominator"]
    x = torch.randn(7, 8)
    agree(run(path, x)[0], act(x))


@torch.no_grad()
@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.filterwarnings("ignore")
def test_texts_of_any_length(tmp_path, family):
    pytest.importorskip("transformers")
    model = text_models.FAMILIES[family]()
    text_models.convert(model)
    path = grkan.export(model, tmp_path / "text.onnx")
    proto = onnx.load(path)
    assert [(value.name, sizes(value)) for value in proto.graph.input] == [
        (name, ["batch", "length"]) for name in ("input_ids", "attention_mask")
    ]
    assert len(functions(proto)) == 4
    for shape in ((1, 3), (4, 17)):
        tokens = torch.randint(0, 99, shape)
        mask = torch.ones_like(tokens)
        mask[-1, 2:] = 0
        expected = model(input_ids=tokens, attention_mask=mask)
        agree(run(path, tokens, mask)[0][mask.bool().numpy()], expected[0][mask.bool()], 1e-4)


@torch.no_grad()
@pytest.mark.parametrize("model", [kat, Mixed], ids=["kat", "mixed"])
def test_pytorchs_exporter_alone_in_float32(tmp_path, model):
    """Without `grkan.export`, with the default backend: plain operations, none of them in float64."""
    model = models.changed(model())
    x = (images(2),) if not isinstance(model, Mixed) else (torch.randn(2, 8, 3, 4), torch.rand(2, 1, 1))
    torch.onnx.export(model, x, tmp_path / "plain.onnx", dynamo=True, verbose=False)
    proto = onnx.load(tmp_path / "plain.onnx")
    double = onnx.TensorProto.DOUBLE
    casts = [a.i for node in proto.graph.node if node.op_type == "Cast" for a in node.attribute]
    assert double not in [*casts, *(tensor.data_type for tensor in proto.graph.initializer)]
    assert not {"Where", "IsInf", "ReduceMax"} & {node.op_type for node in proto.graph.node}
    expected = model(*x)
    for found, wanted in zip(run(tmp_path / "plain.onnx", *x), door_outputs(expected), strict=True):
        agree(found, wanted)


def door_outputs(y):
    return list(y.values()) if isinstance(y, dict) else [y]


# A failed check leaves nothing.


def test_a_file_that_computes_something_else_does_not_appear(tmp_path, monkeypatch):
    text = exporter.function_text
    monkeypatch.setattr(exporter, "function_text", lambda *kind: text(*kind).replace("Q = Add", "Q = Sub"))
    with pytest.raises(RuntimeError, match=r"something different from PyTorch: .*output differs by .*nothing"):
        grkan.export(layer(), tmp_path / "wrong.onnx", example=ROWS)
    assert list(tmp_path.iterdir()) == []


def test_the_old_file_stays_if_the_new_one_is_wrong(tmp_path, monkeypatch):
    (tmp_path / "old.onnx").write_bytes(b"old")
    monkeypatch.setattr(exporter, "runner", lambda file: lambda call: [torch.zeros(1)])
    with pytest.raises(RuntimeError, match=r"shape \(1,\) for inputs of shape .*, but PyTorch returns \(2, 16\)"):
        grkan.export(layer(), tmp_path / "old.onnx", example=ROWS)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"old"]


class Untraceable(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.act = grkan.GroupRational(4)

    def forward(self, x):
        return self.act(x) if float(x.sum()) > 0 else x


def test_what_cannot_be_traced(tmp_path):
    with pytest.raises(ValueError, match=r"model cannot be traced by torch\.onnx\.export: \w+: ") as error:
        grkan.export(Untraceable(), tmp_path / "model.onnx", example=torch.randn(2, 8))
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_bfloat16(tmp_path):
    with pytest.raises(TypeError, match="float16 or float32 for ONNX; got bfloat16"):
        grkan.export(kat().bfloat16(), tmp_path / "model.onnx")


def test_the_model_stays_as_it_is(tmp_path):
    model = layer().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    grkan.export(torch.nn.DataParallel(model), tmp_path / "model.onnx", example=ROWS)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert isinstance(model.act1, grkan.GroupRational)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_every_format_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.delitem(sys.modules, "grkan.export.onnx")
    with pytest.raises(ImportError, match=r"needs onnxruntime; install it with: pip install \"grkan\[onnx\]\""):
        door.export(kat(), "model.onnx")
