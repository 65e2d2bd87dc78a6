"""ONNX decoders that `export --to onnx` writes: what is in the graph, and whether its files hold together.

The graph is read with the onnx package, its data file by the offsets that the graph states; one initializer is held at
a time.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qtool import found, manifest
from qtool.errors import CheckpointError
from qtool.independent import values_sha256
from qtool.independent.onnx import matmul_nbits
from qtool.inspect import graph_config
from qtool.inspect.files import SCHEMA, Step, dtype_name, no_steps
from qtool.inspect.layers import FIRST
from qtool.inspect.summary import architecture, made_by, schemes_of
from qtool.onnx_graph import genai
from qtool.onnx_graph.builder import library
from qtool.onnx_graph.weights import Blocks, unpack
from qtool.recipe import Scheme
from qtool.tensors import FLOATING, all_finite, any_number

CONFIG = "genai_config.json"
PRODUCT = "MatMulNBits"
TABLES = ("cos_cache", "sin_cache")  # computed, no parameters


@dataclass(frozen=True)
class Placed:
    """An initializer: its element type and shape, and its bytes in a file beside the graph (None: in the graph)."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    file: str | None
    offset: int
    length: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Graph:
    """nodes: as onnx has them.  placed: initializers by name.  inputs, outputs: sizes by name.  config:
    genai_config.json."""

    folder: Path
    nodes: list[Any]
    placed: dict[str, Placed]
    inputs: dict[str, list[Any]]
    outputs: dict[str, list[Any]]
    config: Mapping[str, Any]
    record: dict[str, Any] | None

    def products(self) -> Iterator[tuple[Any, dict[str, int]]]:
        """The quantized linears: nodes and their attributes."""
        for node in self.nodes:
            if node.op_type == PRODUCT:
                yield node, {entry.name: entry.i for entry in node.attribute}

    def read(self, name: str) -> torch.Tensor:
        """Raises CheckpointError where the file ends early."""
        one = self.placed[name]
        if one.file is None:
            raise CheckpointError(f"{self.folder}: {name} lies in the graph itself, not in a data file; that is not "
                                  "read")
        try:
            with (self.folder / one.file).open("rb") as file:
                file.seek(one.offset)
                data = bytearray(file.read(one.nbytes))
        except OSError as error:
            raise CheckpointError(f"{self.folder}: {name} cannot be read ({error}); fetch the files again") from None
        if len(data) != one.nbytes:
            raise CheckpointError(f"{self.folder / str(one.file)}: ends inside {name}; fetch the file again")
        if not data:
            return torch.empty(one.shape, dtype=one.dtype)
        return torch.frombuffer(data, dtype=one.dtype).reshape(one.shape)


def is_graph(path: str) -> bool:
    """Whether a directory holds an ONNX decoder and no checkpoint."""
    folder = Path(path)
    try:
        return (folder / genai.MODEL_FILE).is_file() and not any(folder.glob("*.safetensors"))
    except OSError:  # no path that this system can look at; opening it says so
        return False


def open_graph(path: str) -> Graph:
    """Raises CheckpointError for a graph that cannot be read, InputError where the onnx package is missing."""
    onnx, folder = library(), Path(path)
    where = folder / genai.MODEL_FILE
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(where, load_external_data=False)
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8")) if (folder / CONFIG).is_file() else {}
    except (DecodeError, OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: cannot be read as an ONNX decoder ({error}); fetch the files again") from None
    placed = {tensor.name: _placed(tensor, where) for tensor in model.graph.initializer}
    record = manifest.load(folder) if (folder / manifest.NAME).is_file() else None
    return Graph(folder, list(model.graph.node), placed, _sides(model.graph.input),
                 _sides(model.graph.output), config, record)


def _sides(values: Any) -> dict[str, list[Any]]:
    """Name -> sizes, a text for those that are known when the graph runs."""
    return {one.name: [side.dim_value or side.dim_param for side in one.type.tensor_type.shape.dim] for one in values}


def _placed(tensor: Any, where: Path) -> Placed:
    from onnx import TensorProto

    names = {TensorProto.FLOAT: torch.float32, TensorProto.FLOAT16: torch.float16, TensorProto.BFLOAT16: torch.bfloat16,
             TensorProto.UINT8: torch.uint8, TensorProto.INT8: torch.int8, TensorProto.INT32: torch.int32,
             TensorProto.INT64: torch.int64, TensorProto.BOOL: torch.bool, TensorProto.DOUBLE: torch.float64}
    if tensor.data_type not in names:
        raise CheckpointError(f"{where}: {tensor.name} has element type {tensor.data_type}, which is not read")
    told = {entry.key: entry.value for entry in tensor.external_data}
    file = told.get("location")
    if file is not None and (Path(file).is_absolute() or ".." in Path(file).parts):
        raise CheckpointError(f"{where}: {tensor.name} lies in {file}, outside of the directory")
    try:
        return Placed(names[tensor.data_type], tuple(tensor.dims), file, int(told.get("offset", 0)),
                      int(told.get("length", 0)))
    except ValueError:
        raise CheckpointError(f"{where}: {tensor.name} has no number for its place ({told})") from None


def summary(graph: Graph) -> dict[str, Any]:
    """The same keys as the summary of a checkpoint."""
    rows, config = layers(graph), _config(graph)
    quantized = {name for node, _ in graph.products() for name in node.input[1:] if name}
    kept = {name: one for name, one in graph.placed.items() if name not in quantized and one.file is not None}
    weights = sum(row["shape"][0] * row["shape"][1] for row in rows)
    parameters = weights + sum(math.prod(one.shape) for name, one in kept.items() if not name.endswith(TABLES))
    stored = sum(one.nbytes for one in graph.placed.values())
    count = sum(row["bytes"] for row in rows)
    return {
        "schema": SCHEMA, "path": str(graph.folder), "kind": "onnx",
        "architecture": architecture(config),
        "format": "onnx", "dtype": _computed(graph), "blocks": config.get("num_hidden_layers"),
        "parameters": parameters, "weight_bytes": stored,
        "bits_per_parameter": round(8 * stored / max(parameters, 1), 4),
        "bits_per_weight": round(8 * count / weights, 4) if weights else round(8 * stored / max(parameters, 1), 4),
        "schemes": schemes_of(rows), "not_quantized": _kept(kept), "error": manifest.errors(rows), "kv_cache": None,
        "outliers": None, "made_by": made_by(graph.record), "allocation": None, "learned": None,
        "operators": dict(sorted(Counter(node.op_type for node in graph.nodes).items())),
    }


def layers(graph: Graph) -> list[dict[str, Any]]:
    """One record per MatMulNBits, in the order of the graph; the manifest's figures where names agree."""
    recorded = {layer["stored"]: layer for layer in (graph.record or {}).get("layers", [])}
    rows = []
    for node, told in graph.products():
        stored, name = node.input[1].removesuffix(".qweight"), _stored_name(node)
        known = recorded.get(name, {})
        count = sum(graph.placed[one].nbytes for one in node.input[1:] if one in graph.placed)
        scheme = _scheme(node, told)
        shape = [told.get("N", 0), told.get("K", 0)]
        row = {"name": name, "stored": stored, **{key: value for key, value in known.items() if key not in (
            "name", "stored")}, "shape": shape, "scheme": scheme.model_dump(), "scheme_label": scheme.label,
            "bits": scheme.bits, "group_size": scheme.group_size, "symmetric": scheme.symmetric, "bytes": count,
            "bits_per_weight": round(8 * count / max(shape[0] * shape[1], 1), 4),
            **{key: known.get(key) for key in ("relative_error", "weight_error", "sqnr_db")}}
        rows.append({**{key: row[key] for key in FIRST if key in row}, **row})
    return rows


def verify(graph: Graph, step: Step = no_steps) -> list[str]:
    """Everything that is wrong beside damage(), one sentence each: places in the data file, names that nothing makes,
    shapes of MatMulNBits against its attributes, every initializer finite, and every product decoded twice."""
    problems = _wrong_places(graph) + _wrong_names(graph)
    problems += graph_config.faults(graph.config, graph.inputs, graph.outputs, genai.MODEL_FILE) if graph.config else []
    if problems:
        return problems
    shapes = {node.name: wrong for node, told in graph.products() if (wrong := _wrong_product(graph, node, told))}
    problems += [f"{name}: {wrong}" for name, wrong in shapes.items()]
    for done, (name, one) in enumerate(graph.placed.items()):
        step(done, len(graph.placed), name)
        if one.file is not None and one.dtype in FLOATING and not all_finite(graph.read(name)):
            problems.append(f"{name}: some values are NaN or infinite")
    for node, told in graph.products():
        if node.name not in shapes:
            problems += _wrong_weight(graph, node, told)
    return problems


def _wrong_weight(graph: Graph, node: Any, told: Mapping[str, int]) -> list[str]:
    """Of a product: decoded as always, as the operator is described, and as it was solved."""
    weight, stored = decoded(graph, node, told), _stored_name(node)
    if not all_finite(weight):
        return [f"{node.name}: its weight does not decode to finite values"]
    packed, scales, *zeros = (graph.read(name) for name in node.input[1:4] if name)
    again = matmul_nbits(packed.numpy(), scales.float().numpy(), zeros[0].numpy() if zeros else None, told["N"],
                         told["K"], told["bits"], told["block_size"])
    if not torch.equal(weight, torch.from_numpy(again)):
        return [f"{node.name}: decoded as MatMulNBits is described it is another weight; this is a bug in qtool"]
    known = next((layer.get("values_sha256") for layer in (graph.record or {}).get("layers", [])
                  if layer["stored"] == stored), None)
    if known is not None and values_sha256(again) != known:
        return [f"{stored}: its values are not those that were solved (their sha256 differs from the manifest's)"]
    return []


def decoded(graph: Graph, node: Any, told: Mapping[str, int]) -> torch.Tensor:
    """float32 [N, K] that a MatMulNBits multiplies by."""
    form = Blocks(told["bits"], told["block_size"], _zeros(node) is not None, graph.placed[node.input[2]].dtype)
    tensors = [graph.read(name) for name in node.input[1:4] if name]
    weight: torch.Tensor = found.load("grids", "affine").decode(unpack(tensors, form))
    return weight


def _wrong_places(graph: Graph) -> list[str]:
    """Initializers outside their file, of another length than their shape, or over each other."""
    problems, ends = [], dict[str, int]()
    apart = [(one.file, one.offset, name, one) for name, one in graph.placed.items() if one.file is not None]
    for file, offset, name, one in sorted(apart, key=lambda entry: entry[:3]):
        path = graph.folder / str(file)
        size = path.stat().st_size if path.is_file() else None
        if size is None:
            problems.append(f"{name}: its file {path} is not there")
        elif offset + one.nbytes > size:
            problems.append(f"{name}: ends at byte {offset + one.nbytes} of {path}, which has {size}")
        elif one.length not in (0, one.nbytes):
            problems.append(f"{name}: {one.length} bytes for {dtype_name(one.dtype)} {list(one.shape)}")
        elif offset < ends.get(str(file), 0):
            problems.append(f"{name}: begins inside another tensor of {path}")
        ends[str(file)] = offset + one.nbytes
    return problems


def _wrong_names(graph: Graph) -> list[str]:
    """Values that a node takes and nothing gives, in the order of the graph; initializers that nothing takes."""
    known, used = {*graph.placed, *graph.inputs}, set[str]()
    problems = []
    for node in graph.nodes:
        problems += [f"{node.name}: takes {name}, which nothing before it gives" for name in node.input
                     if name and name not in known]
        known.update(node.output)
        used.update(node.input)
    return problems + [f"{name}: no node takes it" for name in graph.placed if name not in used]


def _wrong_product(graph: Graph, node: Any, told: Mapping[str, int]) -> str | None:
    """The shapes that onnxruntime's documentation of MatMulNBits states."""
    missing = [key for key in ("N", "K", "bits", "block_size") if not told.get(key)]
    if missing or len(node.input) < 3:
        return f"has no {', '.join(missing) or 'scales'}"
    rows, count = told["N"], math.ceil(told["K"] / told["block_size"])
    wanted = {node.input[1]: (rows * count * (told["block_size"] * told["bits"] // 8), torch.uint8),
              node.input[2]: (rows * count, graph.placed[node.input[2]].dtype)}
    zeros = _zeros(node)
    if zeros is not None:
        wanted[zeros] = rows * math.ceil(count * told["bits"] / 8), torch.uint8
    for name, (elements, dtype) in wanted.items():
        one = graph.placed[name]
        if math.prod(one.shape) != elements or one.dtype != dtype:
            return (f"{name} is {dtype_name(one.dtype)} {list(one.shape)}, not {dtype_name(dtype)} of {elements} "
                    "elements")
    return None


def _stored_name(node: Any) -> str:
    """Of the linear in the checkpoint that the graph was exported from."""
    return str(node.input[1]).removesuffix(".qweight").removesuffix(f".{PRODUCT}").replace(".attn.", ".self_attn.")


def _zeros(node: Any) -> str | None:
    return node.input[3] if len(node.input) > 3 and node.input[3] else None


def _scheme(node: Any, told: Mapping[str, int]) -> Scheme:
    return Scheme.model_validate({"bits": told.get("bits", 4), "group_size": told.get("block_size", 32),
                                  "symmetric": _zeros(node) is None})


def _config(graph: Graph) -> dict[str, Any]:
    """config.json, where it was written beside the graph; else what genai_config.json says."""
    path = graph.folder / "config.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}); fetch the file again") from None
    told = graph.config.get("model", {})
    return data or {"model_type": told.get("type", "unknown"),
                    "num_hidden_layers": told.get("decoder", {}).get("num_hidden_layers")}


def _computed(graph: Graph) -> str:
    """The element type of the norms, in which the graph computes."""
    kinds = Counter(dtype_name(one.dtype) for one in graph.placed.values()
                    if len(one.shape) == 1 and one.dtype in FLOATING and one.file is not None)
    return kinds.most_common(1)[0][0] if kinds else "float32"


def _kept(kept: Mapping[str, Placed]) -> list[dict[str, Any]]:
    groups: dict[tuple[str, str, str], list[Placed]] = {}
    for name, one in kept.items():
        vector = len(one.shape) < 2
        why = ("table of positions" if name.endswith(TABLES) else "not a matrix" if vector else
               "embedding" if "embed" in name else "not quantized in the source")
        pattern = "biases and norms" if vector else any_number(name.removesuffix(".weight"))
        groups.setdefault((pattern, why, dtype_name(one.dtype)), []).append(one)
    lines = [{"name": name, "reason": why, "dtype": dtype, "tensors": len(ones),
              "elements": sum(math.prod(one.shape) for one in ones), "bytes": sum(one.nbytes for one in ones)}
             for (name, why, dtype), ones in groups.items()]
    return sorted(lines, key=lambda line: (-line["bytes"], line["name"]))
