"""ONNX: a node `grkan::GroupRational` for every rational function, with its definition in the same file.

The definition is a function of standard operators. A runtime puts it in place of the node unless it has a faster
implementation, as ONNX Runtime has with `grkan.onnx_library()`.
"""

import copy
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser
import onnx_ir as ir
import onnxruntime
import onnxscript.rewriter.pattern
import torch
from torch import Tensor, nn

from .._version import __version__
from ..errors import GrkanTypeError
from ..nn import GroupRational
from ..writing import replacing_files
from .job import FIXED, Call, Job, quietly
from .plain import plain, replace_functions

DOMAIN, NODE, VERSION = "grkan", "GroupRational", 1

OPSET = 20
"""The opset of the file; the functions need 18."""

_PARAMETERS = ("numerator", "denominator")

Kind = tuple[int, int, str]
"""What a function's definition depends on: m, n and the form."""

_LARGE = 2**31 - 2**20
"""From this many bytes on, weights go into a separate file: a protocol buffer holds less than 2 GiB."""

_INT8_TOLERANCE = 0.2

_NUMPY = {torch.float16: np.float16, torch.float32: np.float32, torch.float64: np.float64}


def write_onnx(job: Job, path: Path, inline: bool = False, int8: bool = False) -> None:
    """Write a job to a file. From 2 GiB on, its weights go into a second file, PATH.data."""
    model = to_onnx(job, inline)
    with replacing_files(path) as file:
        if int8:
            with tempfile.TemporaryDirectory(dir=file.parent) as folder:
                for weight in model.graph.initializers.values():
                    # ONNX Runtime before 1.32 transposes weights, but not their recorded shapes.
                    weight.shape = weight.type = None
                save(model, Path(folder, "model.onnx"))
                _quantise(Path(folder, "model.onnx"), file)
        else:
            save(model, file)
        what = f"the ONNX file, in ONNX Runtime {onnxruntime.__version__},"
        job.check(what, runner(file), _INT8_TOLERANCE if int8 else None)


def to_onnx(job: Job, inline: bool) -> ir.Model:
    """Convert a job to an ONNX model; inline: with standard operators only."""
    if job.dtype not in _NUMPY:
        raise GrkanTypeError(f"model must be float16 or float32 for ONNX; got {str(job.dtype).removeprefix('torch.')}")
    functions: dict[str, GroupRational] = {}
    if inline:
        traced = plain(job.model)
    else:

        def node(name: str, act: GroupRational) -> nn.Module:
            functions[name] = act
            return _Node(name, act)

        # Copy the modules, but share the tensors.
        shared: dict[int, Any] = {id(t): t for t in (*job.model.parameters(), *job.model.buffers())}
        traced = replace_functions(copy.deepcopy(job.model, shared), node)
    model = _trace(traced, job)
    if functions:
        _complete(model, functions)
    _describe(model, job)
    return model


class _Node(nn.Module):
    """A stand-in for a rational function in PyTorch's exporter: one node that names its coefficients."""

    def __init__(self, name: str, act: GroupRational) -> None:
        super().__init__()
        self.name, self.form, self.channel_dim = name, act.form, act.channel_dim

    def forward(self, x: Tensor) -> Tensor:
        """Compute F(x)."""
        dim = self.channel_dim if self.channel_dim < 0 else self.channel_dim - x.dim()
        attributes: Any = {"form": self.form, "channel_dim": dim, "of": self.name}
        return torch.onnx.ops.symbolic(
            f"{DOMAIN}::{NODE}", (x,), attributes, dtype=x.dtype, shape=x.shape, version=VERSION
        )


def _trace(model: nn.Module, job: Job) -> ir.Model:
    with quietly("traced by torch.onnx.export", FIXED):
        program: Any = torch.onnx.export(
            model,
            job.example.args,
            kwargs=dict(job.example.kwargs),
            dynamo=True,
            verbose=False,
            opset_version=OPSET,
            dynamic_shapes=job.dynamic_shapes(lambda name: name),
            output_names=list(job.expected[0]),
        )
    model_: ir.Model = program.model
    _transpose_keys_at_once(model_)
    return model_


def _transpose_keys_at_once(model: ir.Model) -> None:
    """Replace the nine nodes that the exporter writes for a transposition in attention with dynamic sizes by one."""
    whole = 2**63

    def nine(op: Any, x: Any) -> Any:
        sizes = op.Shape(x, start=0)
        last, last_but_one = op.Slice(sizes, [-1], [whole - 1]), op.Slice(sizes, [-2], [-1])
        others = op.Slice(sizes, [-whole], [-2])
        matrices = op.Reshape(x, op.Concat([-1], last_but_one, last, axis=0))
        return op.Reshape(op.Transpose(matrices, perm=[0, 2, 1]), op.Concat(others, last, last_but_one, axis=0))

    def known_rank(_: Any, x: Any, **__: Any) -> bool:
        return x.shape is not None and len(x.shape) > 1

    def one(op: Any, x: Any, **_: Any) -> Any:
        rank = len(x.shape)
        return op.Transpose(x, perm=[*range(rank - 2), rank - 1, rank - 2])

    onnxscript.rewriter.rewrite(model, [onnxscript.rewriter.pattern.RewriteRule(nine, one, known_rank)])


def _complete(model: ir.Model, functions: dict[str, GroupRational]) -> None:
    """Add the coefficients to the nodes, and the definitions of the nodes to the file."""
    graph, coefficients = model.graph, {}
    for name, act in functions.items():
        for parameter, rows in zip(_PARAMETERS, act.coefficients(), strict=True):
            full = f"{name}.{parameter}".lstrip(".")
            value = ir.Value(name=full, const_value=ir.tensor(rows.detach().float().numpy(), name=full))
            value.shape, value.dtype = ir.Shape(rows.shape), ir.DataType.FLOAT
            coefficients[name, parameter] = value
    nodes = [node for node in graph.all_nodes() if (node.domain, node.op_type) == (DOMAIN, NODE)]
    if not nodes:
        return
    names = [node.attributes.pop("of").as_string() for node in nodes]
    # One definition for all: ONNX Runtime before 1.27 takes the first one for every overload of a function.
    kinds = list(dict.fromkeys(_kind(functions[name]) for name in names))
    for number, (node, name) in enumerate(zip(nodes, names, strict=True)):
        inputs = [coefficients[name, parameter] for parameter in _PARAMETERS]
        for value in inputs:
            graph.register_initializer(value)
        attributes = list(node.attributes.values())
        if len(kinds) > 1:
            attributes.append(ir.AttrInt64("kind", kinds.index(_kind(functions[name]))))
        new = ir.Node(
            DOMAIN, NODE, [node.inputs[0], *inputs], attributes, version=VERSION, name=f"{name or NODE}/{number}"
        )
        old, value = node.outputs[0], new.outputs[0]
        value.name, value.shape, value.type = old.name, old.shape, old.type
        ir.convenience.replace_nodes_and_values(graph, node, [node], [new], [old], [value])
    text = function_text(kinds, model.graph.opset_imports[""])
    function = ir.serde.deserialize_function(onnx.parser.parse_function(text))
    model.functions[function.identifier()] = function
    model.graph.opset_imports[DOMAIN] = VERSION


def _kind(act: GroupRational) -> Kind:
    return *act.order, act.form


def function_text(kinds: Sequence[Kind], opset: int = OPSET) -> str:
    """Return the definition of a node (arXiv 2409.10594, Eq. 11 and 12) in ONNX's textual syntax.

    P and Q are computed by Horner's method in float32, as in `grkan.plain`. The coefficients of a power become a tensor
    of shape (C, 1, ..., 1), with a 1 for each dimension after the channels. C comes from x's shape at run time.
    If there are several kinds, the attribute `kind` of a node is the place of its own among them. Being a constant, it
    costs nothing: runtimes remove the branches that are not taken.
    """
    constants = {
        "zeros": "value_ints: ints = [0]",
        "ones": "value_ints: ints = [1]",
        "minus_ones": "value_ints: ints = [-1]",
        "twos": "value_ints: ints = [2]",
        "unit": "value_float: float = 1.0",
    }
    lines = [
        *(f"{name} = Constant <{value}> ()" for name, value in constants.items()),
        "dim = Constant <value_int: int = @channel_dim> ()",
        "sizes = Shape <start: int = @channel_dim> (x)",
        "channels = Slice (sizes, zeros, ones)",
        "shape_a = Shape <start: int = 0, end: int = 1> (numerator)",
        "shape_b = Shape <start: int = 0, end: int = 1> (denominator)",
        "groups = Max (shape_a, shape_b)",
        "width = Div (channels, groups)",
        "behind = Sub (minus_ones, dim)",
        "tail = Expand (ones, behind)",
        "spread = Concat <axis: int = 0> (ones, groups, width)",
        "shape = Concat <axis: int = 0> (minus_ones, channels, tail)",
    ]
    *others, last = range(len(kinds))
    choice, result = _kind_text(*kinds[last], last)
    if others:
        lines.append("kind = Constant <value_int: int = @kind> ()")
    for i in reversed(others):
        lines += [f"number_{i} = Constant <value_int: int = {i}> ()", f"is_{i} = Equal (kind, number_{i})"]
        branch, value = _kind_text(*kinds[i], i)
        then = f"then_branch: graph = kind_{i} () => ({value}) {{ {branch} }}"
        otherwise = f"else_branch: graph = not_{i} () => ({result}) {{ {choice} }}"
        choice, result = f"choice_{i} = If (is_{i}) <{then}, {otherwise}>", f"choice_{i}"
    body = "\n".join([*lines, choice, f"y = CastLike ({result}, x)"])
    attributes = "form, channel_dim, kind" if others else "form, channel_dim"
    head = f'<domain: "{DOMAIN}", opset_import: ["" : {opset}]>'
    return f"{head}\n{NODE} <{attributes}> (x, numerator, denominator) => (y)\n{{\n{body}\n}}"


def _kind_text(m: int, n: int, form: str, number: int) -> tuple[str, str]:
    """Return the text of the nodes that compute a function of a kind from x, and the name of its value."""
    lines = ["z = Cast <to: int = 1> (x)"]

    def columns(letter: str, name: str, count: int) -> None:
        lines.append(f"{letter}_columns = Transpose <perm: ints = [1, 0]> ({name})")
        lines.append(f"{letter}_deep = Unsqueeze ({letter}_columns, twos)")
        lines.append(f"{letter}_wide = Expand ({letter}_deep, spread)")
        lines.append(f"{letter}_all = Reshape ({letter}_wide, shape)")
        for i in range(count):
            lines.append(f"{letter}{i}_at = Constant <value_int: int = {i}> ()")
            lines.append(f"{letter}{i} = Gather <axis: int = 0> ({letter}_all, {letter}{i}_at)")

    def horner(letter: str, count: int, variable: str) -> str:
        value = f"{letter}{count - 1}"
        for i in reversed(range(count - 1)):
            lines.append(f"{letter}{i}_product = Mul ({value}, {variable})")
            value = f"{letter}{i}_sum"
            lines.append(f"{value} = Add ({letter}{i}_product, {letter}{i})")
        return value

    result = f"F_{number}"
    columns("a", "numerator", m + 1)
    numerator = horner("a", m + 1, "z")
    if m == 0:  # of the shape of x
        lines += ["shape_x = Shape (x)", f"constant = Expand ({numerator}, shape_x)"]
        numerator = "constant"
    if n:
        absolute = form == "sum_of_abs"
        source = "denominator"
        if absolute:
            lines += ["t = Abs (z)", "b_absolute = Abs (denominator)"]
            source = "b_absolute"
        variable = "t" if absolute else "z"
        columns("b", source, n)
        inner = horner("b", n, variable)
        lines.append(f"inner = Mul ({inner}, {variable})")
        lines += [] if absolute else ["size = Abs (inner)"]
        lines.append(f"Q = Add ({'inner' if absolute else 'size'}, unit)")
        lines.append(f"{result} = Div ({numerator}, Q)")
    else:
        lines.append(f"{result} = Identity ({numerator})")
    return "\n".join(lines), result


def _describe(model: ir.Model, job: Job) -> None:
    """Describe the model in the file, and remove the paths of its code that the exporter writes."""
    model.producer_name, model.producer_version = "grkan", __version__
    for graph in model.graphs():
        graph.metadata_props.clear()
        for node in graph:
            node.metadata_props.clear()
        for value in (*graph.inputs, *graph.outputs, *graph.initializers.values()):
            value.metadata_props.clear()
    model.metadata_props.clear()
    record = job.metadata
    properties: dict[str, Any] = {
        "model": record["model"] or type(job.model).__name__,
        "classes": record["classes"],
        "preprocessing": record["preprocessing"],
        "arguments": record["arguments"] or None,
        "grkan_version": __version__,
        "torch_version": torch.__version__,
    }
    for name, value in properties.items():
        if value is not None:
            model.metadata_props[name] = value if isinstance(value, str) else json.dumps(value)


def save(model: ir.Model, file: Path) -> None:
    """Write the file. From 2 GiB on, the weights go into a second file beside it."""
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    ir.save(model, file, external_data=_data(file).name if size >= _LARGE else None)


def _quantise(source: Path, file: Path) -> None:
    """Quantise the weights of matrix products to 8 bits, with a scale per column; inputs are quantised at run time."""
    from onnxruntime.quantization import quantize_dynamic

    with quietly("quantised by ONNX Runtime"):
        quantize_dynamic(
            source,
            file,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            use_external_data_format=_data(source).exists(),
        )


def _data(file: Path) -> Path:
    """Return the path of the separate file for weights."""
    return file.with_name(f"{file.name}.data")


def runner(file: Path, library: Path | None = None, threads: int = 0) -> Any:
    """Return a function that runs a file for a Call, in ONNX Runtime."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    if library is not None:
        options.register_custom_ops_library(str(library))
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]

    def run(call: Call) -> Sequence[Any]:
        return session.run(None, feeds(names, call))

    return run


def feeds(names: Sequence[str], call: Call) -> dict[str, Any]:
    """Return the tensors of a call by the names of a graph's inputs."""
    named = {name: value for name, value in call.kwargs.items() if isinstance(value, Tensor) and name in names}
    others = iter(name for name in names if name not in named)
    ids = {id(value) for value in named.values()}
    feeds = {next(others): t for t in call.tensors() if id(t) not in ids} | named
    return {name: t.numpy() for name, t in feeds.items()}
