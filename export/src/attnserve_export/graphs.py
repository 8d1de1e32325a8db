"""PyTorch modules to ONNX graphs, by `torch.onnx.export(dynamo=True)`."""

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

_HALVES = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)

# What the dimensions of an input are called, where they are dynamic; an integer is fixed.
Dims = tuple[str | int, ...]


@dataclass(frozen=True)
class Input:
    """One input of a graph: an example, and the names of its dynamic dimensions."""

    name: str
    example: Tensor
    dims: Dims


@dataclass(frozen=True)
class Graph:
    """A graph, and those of its tensors that lie outside of it.

    Attributes:
        model: of `parameters` it has names, types and shapes alone.
        parameters: by the names of initializers; perhaps more than the graph has.
    """

    model: onnx.ModelProto
    parameters: dict[str, Tensor] = field(default_factory=dict)


def export(
    module: nn.Module,
    inputs: Sequence[Input],
    outputs: Sequence[str],
    opset: int,
    *,
    by_name: bool = False,
    ends: Mapping[str, int] | None = None,
) -> onnx.ModelProto:
    """Export a module.

    Dimensions of one name are one dynamic dimension. An input whose dimensions broadcast in ONNX
    (a bias) is traced at full size under the other inputs' names: `free_dims` frees it.

    Args:
        module: in evaluation mode; its forward takes the inputs in order.
        inputs: with examples whose dynamic dimensions are all different and above 1.
        outputs: their names, in order.
        opset: of the default domain, 23 or newer.
        by_name: the inputs are called as the arguments of forward, in the same order, of which
            some may be left out.
        ends: the largest sizes of dimensions that have one, for modules that are traced in one way
            or not at all; None: all ways are tried.

    Returns:
        The graph with its weights inside.
    """
    by_axis = _dynamic(inputs, ends)
    shapes = by_axis if by_name else tuple(by_axis.values())
    positional = () if by_name else tuple(entry.example for entry in inputs)
    with _quiet(), torch.no_grad():
        traced: Any = module.eval()
        if ends is not None:
            traced = _traced(module, positional, shapes)
        program = torch.onnx.export(
            traced,
            positional,
            kwargs={entry.name: entry.example for entry in inputs} if by_name else None,
            dynamo=True,
            opset_version=opset,
            input_names=[entry.name for entry in inputs],
            output_names=list(outputs),
            dynamic_shapes=shapes,
            verbose=False,
        )
    assert program is not None
    return _plain(program.model_proto)


def export_apart(
    module: nn.Module,
    inputs: Sequence[Input],
    outputs: Callable[[], Sequence[str]],
    opset: int,
    *,
    ends: Mapping[str, int],
    apart: Collection[str],
) -> onnx.ModelProto:
    """Export a module, and leave parameters out: nothing reads their values, or copies them.

    Args:
        module, inputs, opset, ends: as in `export`.
        outputs: their names, in order; called once the module has been traced.
        apart: names of parameters and buffers, as `state_dict` has them.

    Returns:
        The graph, in which these are initializers of no content; those that are not in it are none.
    """
    by_axis = tuple(_dynamic(inputs, ends).values())
    positional = tuple(entry.example for entry in inputs)
    with _quiet(), torch.no_grad():
        traced = _traced(module.eval(), positional, by_axis)
        _multiply_in_fp32(traced)
        program: Any = torch.onnx.export(
            traced,
            positional,
            dynamo=True,
            opset_version=opset,
            input_names=[entry.name for entry in inputs],
            output_names=list(outputs()),
            dynamic_shapes=by_axis,
            verbose=False,
            optimize=False,
        )
        # What is an input is no constant, so that nobody folds it.
        initializers = program.model.graph.initializers
        left_out = [name for name in initializers if name in apart]
        for name in left_out:
            value = initializers.pop(name)
            value.const_value = None
            program.model.graph.inputs.append(value)
        program.optimize()
    model = _plain(program.model_proto)
    taken = {name for node in model.graph.node for name in node.input}
    given = list(model.graph.input)
    del model.graph.input[:]
    for value in given:
        if value.name not in left_out:
            model.graph.input.append(value)
        elif value.name in taken:
            kind = value.type.tensor_type
            dims = [dim.dim_value for dim in kind.shape.dim]
            model.graph.initializer.append(
                onnx.TensorProto(name=value.name, data_type=kind.elem_type, dims=dims)
            )
    return model


def _dynamic(
    inputs: Sequence[Input], ends: Mapping[str, int] | None
) -> dict[str, dict[int, "torch.export.Dim"]]:
    """The dynamic dimensions of each input, by axis."""
    names = {dim for entry in inputs for dim in entry.dims if isinstance(dim, str)}
    if ends is None:
        dynamic = {name: torch.export.Dim(name) for name in sorted(names)}
    else:
        # What PyTorch finds to be different at size 1 (which strides count) is not in a graph.
        dynamic = {name: torch.export.Dim(name, min=2, max=ends.get(name)) for name in names}
    return {
        entry.name: {
            axis: dynamic[dim] for axis, dim in enumerate(entry.dims) if isinstance(dim, str)
        }
        for entry in inputs
    }


def _plain(model: onnx.ModelProto) -> onnx.ModelProto:
    """A graph without the file paths and stack traces that the exporter leaves in it."""
    for node in model.graph.node:
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    for values in (model.graph.value_info, model.graph.input, model.graph.output):
        for value in values:
            value.ClearField("metadata_props")
    for initializer in model.graph.initializer:
        initializer.ClearField("metadata_props")
    model.ClearField("metadata_props")
    model.graph.ClearField("metadata_props")
    return model


def _traced(module: nn.Module, examples: tuple[Tensor, ...], shapes: Any) -> Any:
    """PyTorch's own graph of a module.

    `torch.onnx.export` would try three ways more if this one fails, each as slow, and none of them
    right for modules whose parts keep what they were given.
    """
    with torch.fx.experimental._config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        try:
            return torch.export.export(module, examples, dynamic_shapes=shapes, strict=False)
        except torch._dynamo.exc.UserError as error:
            # A dimension that has an end, say at the size of a table, must be told so.
            refine = torch.export.dynamic_shapes.refine_dynamic_shapes_from_suggested_fixes
            try:
                refined = refine(error.msg, shapes)
            except Exception:  # there is nothing to refine
                raise error from None
            if any(isinstance(size, int) for size in tree_leaves(refined)):
                raise  # the graph would hold for the example's length alone
            return torch.export.export(module, examples, dynamic_shapes=refined, strict=False)


def _multiply_in_fp32(traced: "torch.export.ExportedProgram") -> None:
    """Multiply FP16 and BF16 by numbers that these types do not hold as PyTorch does: in FP32.

    In ONNX both factors have one type, so that such a number would be rounded.

    Args:
        traced: changed in place.
    """
    operators = torch.ops.aten
    for node in list(traced.graph.nodes):
        if node.target not in (operators.mul.Tensor, operators.div.Tensor):
            continue
        given, number = node.args[:2]
        dtype = node.meta["val"].dtype
        exact = not isinstance(number, float) or torch.tensor(number, dtype=dtype).item() == number
        if exact or dtype not in (torch.float16, torch.bfloat16):
            continue
        with traced.graph.inserting_before(node):
            wide = traced.graph.call_function(operators.to.dtype, (given, torch.float32))
        wide.meta["val"] = given.meta["val"].to(torch.float32)
        with traced.graph.inserting_after(node):
            product = traced.graph.call_function(operators.to.dtype, (node, dtype))
        product.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(
            product, delete_user_cb=lambda user, own=product: user is not own
        )
        node.args = (wide, number)
        node.meta["val"] = node.meta["val"].to(torch.float32)
    traced.graph_module.recompile()


def add_function(model: onnx.ModelProto, function: onnx.FunctionProto) -> None:
    """Let a graph bring along an operator of its own, as a function of plain operators."""
    model.functions.append(function)
    known = {entry.domain for entry in model.opset_import}
    if function.domain not in known:
        model.opset_import.append(onnx.helper.make_opsetid(function.domain, 1))


def free_dims(model: onnx.ModelProto, name: str, dims: Sequence[str]) -> None:
    """Give an input that only broadcasts dimensions of its own, so that each may also be 1.

    The exporter takes each dynamic size from whichever input it likes. Where it took one from this
    input, it is taken from another input that has the dimension of the same name.

    Args:
        model: changed in place.
        name: the input.
        dims: what its dimensions are to be called.
    """
    shapes = {
        value.name: [dim.dim_param for dim in value.type.tensor_type.shape.dim]
        for value in model.graph.input
    }
    for node in model.graph.node:
        if node.op_type == "Shape" and node.input[0] == name:
            start, end = (next(a for a in node.attribute if a.name == n) for n in ("start", "end"))
            if end.i != start.i + 1:
                raise AssertionError(f"{node.name} takes more than one size from {name}")
            symbol = shapes[name][start.i]
            node.input[0] = next(n for n in shapes if n != name and symbol in shapes[n])
            start.i = shapes[node.input[0]].index(symbol)
            end.i = start.i + 1
    entry = next(value for value in model.graph.input if value.name == name)
    for dim, symbol in zip(entry.type.tensor_type.shape.dim, dims, strict=True):
        dim.dim_param = symbol
    # Inferred from the traced sizes, and no longer true for all.
    del model.graph.value_info[:]


def free_heads(model: onnx.ModelProto, domain: str) -> None:
    """Let a graph that is one attention operator take any number of heads.

    Heads do not see each other: a caller who has some of them already may have those computed
    before the others. Graphs of more nodes, or with a slope for each head, are left as they are.

    Args:
        model: changed in place.
        domain: of the operator `Attention`.
    """
    node = model.graph.node[0]
    slopes = len(node.input) > 5 and node.input[5]
    if len(model.graph.node) != 1 or (node.domain, node.op_type) != (domain, "Attention") or slopes:
        return
    axes = {
        "query": (1, "heads"),
        "key": (1, "kv_heads"),
        "value": (1, "kv_heads"),
        "sinks": (0, "heads"),
        "output": (1, "heads"),
        "log_sum_exp": (1, "heads"),
    }
    for value in (*model.graph.input, *model.graph.output):
        if value.name in axes:
            axis, name = axes[value.name]
            value.type.tensor_type.shape.dim[axis].dim_param = name


def rename_dims(model: onnx.ModelProto, names: Mapping[str, Mapping[int, str]]) -> None:
    """Make dimensions of outputs dynamic: output name to axis to the dimension's name."""
    for value in model.graph.output:
        for axis, name in names.get(value.name, {}).items():
            value.type.tensor_type.shape.dim[axis].dim_param = name


def cast_outputs(model: onnx.ModelProto, names: Collection[str], dtype: int) -> None:
    """Give outputs another type, which they are cast to at the end.

    Args:
        model: changed in place.
        names: of outputs; those that the graph has not are passed over.
        dtype: as ONNX numbers them.
    """
    for value in model.graph.output:
        if value.name not in names or value.type.tensor_type.elem_type == dtype:
            continue
        name, exact = value.name, f"{value.name}.exact"
        for node in model.graph.node:
            for ends in (node.input, node.output):
                for place, end in enumerate(ends):
                    ends[place] = exact if end == name else end
        cast = onnx.helper.make_node("Cast", [exact], [name], name=f"{name}.cast", to=dtype)
        model.graph.node.append(cast)
        value.type.tensor_type.elem_type = dtype


def widened(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph in FP32: all that is FP16 or BF16 in it, initializers without content too.

    Args:
        model: stays as it is.
    """
    wide = onnx.ModelProto()
    wide.CopyFrom(model)
    del wide.graph.value_info[:]
    for value in (*wide.graph.input, *wide.graph.output):
        if value.type.tensor_type.elem_type in _HALVES:
            value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    for tensor in wide.graph.initializer:
        _widen(tensor)
    for node in wide.graph.node:
        for attribute in node.attribute:
            if attribute.name in ("to", "dtype") and attribute.i in _HALVES:
                attribute.i = onnx.TensorProto.FLOAT
            if attribute.type == onnx.AttributeProto.TENSOR:
                _widen(attribute.t)
    return wide


def _widen(tensor: onnx.TensorProto) -> None:
    if tensor.data_type not in _HALVES:
        return
    if not tensor.raw_data and not tensor.int32_data:
        tensor.data_type = onnx.TensorProto.FLOAT
        return
    exact = onnx.numpy_helper.to_array(tensor).astype(np.float32)
    tensor.CopyFrom(onnx.numpy_helper.from_array(exact, tensor.name))


def write_out_angles(model: onnx.ModelProto) -> None:
    """Give each RotaryEmbedding its angles written out over the batch, which it does not broadcast.

    Args:
        model: changed in place.
    """
    make, nodes = onnx.helper.make_node, []
    for node in model.graph.node:
        if node.op_type == "RotaryEmbedding" and len(node.input) == 3:
            batch, shape = f"{node.name}_batch", f"{node.name}_angles"
            nodes.append(make("Shape", [node.input[0]], [batch], name=batch, start=0, end=1))
            ones = onnx.helper.make_tensor(f"{shape}_ones", onnx.TensorProto.INT64, [2], [1, 1])
            nodes.append(make("Constant", [], [f"{shape}_ones"], name=f"{shape}_ones", value=ones))
            inputs = [batch, f"{shape}_ones"]
            nodes.append(make("Concat", inputs, [shape], name=shape, axis=0))
            for place in (1, 2):
                given, made = node.input[place], f"{node.name}_angles_{place}"
                nodes.append(make("Expand", [given, shape], [made], name=made))
                node.input[place] = made
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def default_to_zeros(model: onnx.ModelProto, name: str, like: str) -> None:
    """Let an input be left out: it is 0 then, at the shape of another.

    Args:
        model: changed in place.
        name: of the input, INT64 and of two dimensions.
        like: of an input of its shape.
    """
    graph, whole, shape = model.graph, f"{name}_everywhere", f"{name}_shape"
    for node in graph.node:
        node.input[:] = [whole if given == name else given for given in node.input]
    make = onnx.helper.make_node
    graph.node.insert(0, make("Expand", [name, shape], [whole], name=whole))
    graph.node.insert(0, make("Shape", [like], [shape], name=shape))
    # An initializer that is an input too is what the input is if it is not given.
    graph.initializer.append(onnx.helper.make_tensor(name, onnx.TensorProto.INT64, [1, 1], [0]))


def keep_apart(model: onnx.ModelProto, op_types: Collection[str]) -> None:
    """Keep ONNX Runtime from fusing some operators with the additions before them.

    On CPUs its SkipLayerNormalization takes 3.5 times as long as the two operators that it stands
    for, and its BiasGelu 1.4 times (1.31.1; benchmarks/tokens.py shows the difference). They are
    recognised by an addition's output being their input, so each gets it flattened, which costs
    nothing, and its output gets the shape back.

    Args:
        model: changed in place.
        op_types: operators that leave all but the last dimension alone.
    """
    nodes = []
    for node in model.graph.node:
        if node.op_type not in op_types or node.domain not in ("", "ai.onnx"):
            nodes.append(node)
            continue
        given, made = node.input[0], node.output[0]
        make = onnx.helper.make_node
        nodes.append(make("Shape", [given], [f"{made}_shape"], name=f"{node.name}_shape"))
        nodes.append(
            make("Flatten", [given], [f"{made}_rows"], name=f"{node.name}_flatten", axis=-1)
        )
        node.input[0], node.output[0] = f"{made}_rows", f"{made}_flat"
        nodes.append(node)
        inputs = [f"{made}_flat", f"{made}_shape"]
        nodes.append(make("Reshape", inputs, [made], name=f"{node.name}_unflatten"))
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def opset_of(model: onnx.ModelProto) -> int:
    """The version of the default domain."""
    return next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's notes to itself: what matters of a graph is verified."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)
