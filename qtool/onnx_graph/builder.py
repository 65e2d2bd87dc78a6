"""Nodes and initializers of a graph, and the ONNX model made of them. Large tensors stay outside, in another file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

import qtool
from qtool.errors import InputError
from qtool.onnx_graph.weights import Part
from qtool.tensors import TensorSpec

MICROSOFT = "com.microsoft"
OPSETS = {"": 21, MICROSOFT: 1}
IR_VERSION = 10
DATA_FILE = "model.onnx.data"
Shape = Sequence[int | str]  # a string is a size that is known when the graph runs
Place = Callable[[str], tuple[int, int]]  # initializer -> (offset, bytes) in DATA_FILE


def library() -> Any:
    """The onnx package. InputError when it is not installed."""
    try:
        import onnx
    except ImportError:
        raise InputError("writing ONNX needs the package onnx; install it: pip install 'qtool[onnx]'") from None
    return onnx


class Graph:
    """A graph in the making. A value is known by its name; a node's single output is called NODE/output_0."""

    def __init__(self) -> None:
        self.onnx = library()
        self.nodes: list[Any] = []
        self.parts: list[Part] = []
        self.constants: dict[str, Any] = {}
        self.inputs: list[Any] = []
        self.outputs: list[Any] = []

    def node(self, operator: str, name: str, inputs: Sequence[str], outputs: Sequence[str] = (), domain: str = "",
             **attributes: Any) -> str:
        """Add a node; returns its first output. An input that is left out is ''."""
        made = list(outputs) or [f"{name}/output_0"]
        self.nodes.append(self.onnx.helper.make_node(operator, list(inputs), made, name=name, domain=domain,
                                                     **attributes))
        return made[0]

    def cast(self, value: str, dtype: torch.dtype, name: str) -> str:
        return self.node("Cast", name, [value], to=self.element_type(dtype))

    def constant(self, values: Sequence[int] | Sequence[float] | int | float, dtype: torch.dtype) -> str:
        """A small initializer inside the graph; equal ones are kept once."""
        tensor = torch.tensor(values, dtype=dtype)
        kind = str(dtype).removeprefix("torch.").upper()
        name = f"/model/constants/{kind}/{values if isinstance(values, (int, float)) else list(values)}"
        self.constants[name] = self.onnx.helper.make_tensor(
            name, self.element_type(dtype), list(tensor.shape), tensor.reshape(-1).tolist())
        return name

    def part(self, part: Part) -> list[str]:
        """Add initializers of the data file; returns their names."""
        self.parts.append(part)
        return [spec.name for spec in part.specs]

    def input(self, name: str, dtype: torch.dtype, shape: Shape) -> str:
        self.inputs.append(self._value(name, dtype, shape))
        return name

    def output(self, name: str, dtype: torch.dtype, shape: Shape) -> None:
        self.outputs.append(self._value(name, dtype, shape))

    def element_type(self, dtype: torch.dtype) -> int:
        kinds = self.onnx.TensorProto
        return {torch.float32: kinds.FLOAT, torch.float16: kinds.FLOAT16, torch.bfloat16: kinds.BFLOAT16,
                torch.int64: kinds.INT64, torch.int32: kinds.INT32, torch.uint8: kinds.UINT8}[dtype]

    def serialized(self, place: Place) -> bytes:
        """The bytes of model.onnx; the same graph gives the same."""
        specs = [spec for part in self.parts for spec in part.specs]
        initializers = [*self.constants.values(), *(self._external(spec, *place(spec.name)) for spec in specs)]
        helper = self.onnx.helper
        model = helper.make_model(
            helper.make_graph(self.nodes, "main_graph", self.inputs, self.outputs, initializers),
            opset_imports=[helper.make_opsetid(domain, version) for domain, version in OPSETS.items()],
            ir_version=IR_VERSION, producer_name="qtool", producer_version=qtool.__version__)
        return bytes(model.SerializeToString(deterministic=True))

    def _external(self, spec: TensorSpec, offset: int, count: int) -> Any:
        tensor = self.onnx.TensorProto(name=spec.name, data_type=self.element_type(spec.dtype), dims=spec.shape,
                                       data_location=self.onnx.TensorProto.EXTERNAL)
        for key, value in (("location", DATA_FILE), ("offset", offset), ("length", count)):
            tensor.external_data.add(key=key, value=str(value))
        return tensor

    def _value(self, name: str, dtype: torch.dtype, shape: Shape) -> Any:
        return self.onnx.helper.make_tensor_value_info(name, self.element_type(dtype), list(shape))
