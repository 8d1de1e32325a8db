"""Graphs whose parameters lie outside of them, in the type in which they are stored.

Where that type is FP16 or BF16 and the graph computes in FP32, each parameter is cast when it is
read: ONNX Runtime's CPU provider multiplies no matrices of either type (1.31.1: around operators of
FP16 it puts casts of its own, to either side of each, and those of BF16 it refuses).
"""

from collections.abc import Mapping
from typing import Any

import onnx
import onnx.helper
import torch
from onnx import NodeProto, TensorProto
from torch import Tensor

from attnserve_export.graphs import Graph

_TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
}
_PRODUCTS = ("MatMul", "Gemm")

# Elements from which on it matters when a matrix is cast.
_LARGE = 1 << 18


def bind(model: onnx.ModelProto, parameters: Mapping[str, Tensor], *, late: bool) -> Graph:
    """Give a graph its parameters.

    Args:
        model: from `graphs.export_apart`; changed.
        parameters: by name, in the types in which they are to be stored.
        late: whether matrices are cast for each product anew, so that a loaded model takes no more
            than they do. Otherwise ONNX Runtime casts them once, while it loads.
    """
    used = dict(parameters)
    _transpose(model, used)
    _cast(model, used, late=late)
    names = {initializer.name for initializer in model.graph.initializer}
    return Graph(model, {name: tensor for name, tensor in used.items() if name in names})


def _transpose(model: onnx.ModelProto, parameters: dict[str, Tensor]) -> None:
    """Transposed parameters are parameters: views of the others, until they are written."""
    graph = model.graph
    known = {entry.name: entry for entry in graph.initializer if entry.name in parameters}
    renamed, nodes = {}, []
    for node in graph.node:
        if node.op_type != "Transpose" or node.input[0] not in known:
            nodes.append(node)
            continue
        given = node.input[0]
        ndim = parameters[given].ndim
        order = next((list(a.ints) for a in node.attribute if a.name == "perm"), None)
        order = order or list(reversed(range(ndim)))
        name = f"{given}.transposed" + ("" if ndim == 2 else "".join(map(str, order)))
        if name not in parameters:
            parameters[name] = parameters[given].permute(order)
            graph.initializer.append(
                TensorProto(
                    name=name, data_type=known[given].data_type, dims=parameters[name].shape
                )
            )
        renamed[node.output[0]] = name
    for node in nodes:
        for place, name in enumerate(node.input):
            node.input[place] = renamed.get(name, name)
    _replace(model, nodes)
    taken = {name for node in nodes for name in node.input}
    for entry in list(graph.initializer):
        if entry.name in parameters and entry.name not in taken:
            graph.initializer.remove(entry)


def _cast(model: onnx.ModelProto, parameters: Mapping[str, Tensor], *, late: bool) -> None:
    wider: dict[str, Tensor] = {}
    for entry in model.graph.initializer:
        if entry.name in parameters:
            tensor = parameters[entry.name]
            stored = _TYPES.get(tensor.dtype, entry.data_type)
            if stored != entry.data_type:
                wider[entry.name] = tensor
                entry.data_type = stored
    writer = _Casts(wider, late)
    for node in model.graph.node:
        writer.add(node)
    _replace(model, writer.nodes)


class _Casts:
    """Writes a graph's nodes anew, with the casts that they need before or after them."""

    def __init__(self, wider: Mapping[str, Tensor], late: bool) -> None:
        self.nodes: list[NodeProto] = []
        self._wider = wider
        self._late = late
        self._made: set[str] = set()

    def add(self, node: NodeProto) -> None:
        """The next node of the graph."""
        if node.op_type == "Gather" and node.input[0] in self._wider:
            # Of a table, what is read is cast.
            read = f"{node.output[0]}.stored"
            cast = _node("Cast", [read], node.output[0], to=TensorProto.FLOAT)
            node.output[0] = read
            self.nodes += [node, cast]
            return
        for place, name in enumerate(node.input):
            if name in self._wider:
                node.input[place] = self._cast(node, name)
        self.nodes.append(node)

    def _cast(self, node: NodeProto, name: str) -> str:
        tensor = self._wider[name]
        product = node.op_type in _PRODUCTS and node.input[0] not in self._wider
        if self._late and product and tensor.ndim == 2 and tensor.numel() >= _LARGE:
            return self._cast_late(name, node.input[0])
        exact = f"{name}.exact"
        self._once(_node("Cast", [name], exact, to=TensorProto.FLOAT))
        return exact

    def _cast_late(self, name: str, beside: str) -> str:
        """A cast that waits for the other factor, so that no more than a few matrices are cast at
        a time, and that is no constant: it is given a shape, its own, that depends on the factor.
        """
        rows, kept, shape = (f"{beside}.{name}.{what}" for what in ("rows", "kept", "shape"))
        same, exact = f"{beside}.{name}.same", f"{beside}.{name}.exact"
        self._constant("attnserve.nothing", 0)
        self._constant("attnserve.rest", -1)
        self._once(_node("Shape", [beside], rows, start=0, end=1))
        self._once(_node("Mul", [rows, "attnserve.nothing"], kept))  # 0: a size that stays
        self._once(_node("Concat", [kept, "attnserve.rest"], shape, axis=0))
        self._once(_node("Reshape", [name, shape], same))
        self._once(_node("Cast", [same], exact, to=TensorProto.FLOAT))
        return exact

    def _constant(self, name: str, value: int) -> None:
        content = onnx.helper.make_tensor(name, TensorProto.INT64, [1], [value])
        self._once(_node("Constant", [], name, value=content))

    def _once(self, node: NodeProto) -> None:
        if node.output[0] not in self._made:
            self._made.add(node.output[0])
            self.nodes.append(node)


def _node(op_type: str, inputs: list[str], output: str, **attributes: Any) -> NodeProto:
    return onnx.helper.make_node(op_type, inputs, [output], name=output, **attributes)


def _replace(model: onnx.ModelProto, nodes: list[NodeProto]) -> None:
    del model.graph.node[:]
    model.graph.node.extend(nodes)
