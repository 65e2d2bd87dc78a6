"""What is fuzzed: one function per parser, from bytes to nothing. It ends in a QtoolError or in a result that its
readers get along with; everything else is a crash. The bytes are a file as others may have written it."""

from __future__ import annotations

import atexit
import contextlib
import functools
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import torch

from qtool import card, decode, footprint, found, inspect, jobs, manifest, recipe
from qtool import journal as journals
from qtool.checkpoint import gguf_tokenizer, open_checkpoint
from qtool.checkpoint.config import checked
from qtool.checkpoint.gguf_file import open_gguf
from qtool.checkpoint.gguf_header import GgufTensor, read_gguf_header
from qtool.checkpoint.header import header_length, parse_header, parse_json
from qtool.checkpoint.imatrix import read_imatrix, spread
from qtool.checkpoint.reader import Checkpoint, place, shard_names
from qtool.checkpoint.tensor_io import read_into
from qtool.errors import QtoolError
from qtool.formats import gguf as gguf_format
from qtool.formats._ggml_fields import TYPES
from qtool.inspect.summary import made_by
from qtool.recipe import Scheme
from qtool.tensors import TensorSpec
from qtool.workspace import Workspace

Target = Callable[[bytes], None]
TARGETS: dict[str, Target] = {}
SMALL = 1 << 20  # bytes of a tensor that is decoded
NAMES = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight", *(
    f"model.layers.{index}.{name}.weight" for index in range(2) for name in (
        "input_layernorm", "post_attention_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
        "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")))


def target(function: Target) -> Target:
    """A QtoolError is an answer."""
    @functools.wraps(function)
    def run(data: bytes) -> None:
        try:
            function(data)
        except QtoolError as error:
            assert str(error), "an error without a message"

    TARGETS[function.__name__] = run
    return run


@functools.cache
def folder() -> Path:
    """Where the bytes become a file; in memory where that is possible."""
    memory = Path("/dev/shm")
    made = Path(tempfile.mkdtemp(prefix="qtool-fuzz-", dir=memory if memory.is_dir() else None))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made


def file(name: str, data: bytes) -> Path:
    path = folder() / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    return path


@target
def safetensors(data: bytes) -> None:
    length = header_length(data[:8], len(data), "f")
    placed = parse_header(data[8:8 + length], len(data), "f")
    assert all(offset + spec.nbytes <= len(data) for spec, offset in placed.values())


@target
def index(data: bytes) -> None:
    said = parse_json(data, "f")
    present = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    files = shard_names(present, said, "d")
    assert set(files) <= set(present)
    place({name: {NAMES[number]: (TensorSpec(NAMES[number], torch.float16, (2, 2)), 8)}
           for number, name in enumerate(files)}, said, "d")


@target
def gguf_header(data: bytes) -> None:
    header = read_gguf_header(file("h.gguf", data))
    assert all(one.offset + one.nbytes <= len(data) for one in header.tensors.values())


@target
def gguf_tensors(data: bytes) -> None:
    """Blocks of any type: by qtool's fields and by gguf's own decoder."""
    path = file("t.gguf", data)
    for tensor in read_gguf_header(path).tensors.values():
        if tensor.nbytes <= SMALL and len(tensor.shape) == 2:
            _decode(path, tensor)


def _decode(path: Path, tensor: GgufTensor) -> None:
    kind, blocks = tensor.kind.name.lower(), bytearray(tensor.nbytes)
    with path.open("rb") as opened:
        assert read_into(opened.fileno(), memoryview(blocks), tensor.offset)
    if kind not in TYPES or not blocks:
        return
    stored = torch.frombuffer(blocks, dtype=torch.uint8).reshape(tensor.shape[0], -1)
    grid, shape = found.load("grids", kind), (tensor.shape[0], tensor.shape[1])
    scheme = Scheme(grid=kind, bits=grid.bits, group_size=grid.super, symmetric=not grid.mins)
    ours = gguf_format.dequantize("x", lambda _: stored, scheme, shape)
    theirs = torch.from_numpy(gguf.dequantize(stored.numpy(), tensor.kind))
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-30, equal_nan=True), kind


@target
def gguf_model(data: bytes) -> None:
    """A whole file: names of tensors, config and tokenizer."""
    checkpoint = open_gguf(file("m.gguf", data), folder() / "work")
    for name, spec in checkpoint.specs.items():
        if spec.nbytes <= SMALL:
            checkpoint.read(name)


@functools.cache
def plain() -> dict[str, TensorSpec]:
    """A Llama of 64 columns and two layers."""
    shapes = {"embed": (512, 64), "lm_head": (512, 64), "norm": (64,), "k_proj": (32, 64), "v_proj": (32, 64),
              "_proj": (64, 64), "gate_proj": (128, 64), "up_proj": (128, 64), "down_proj": (64, 128)}
    return {name: TensorSpec(name, torch.bfloat16, next(
        shape for key, shape in reversed(shapes.items()) if key in name)) for name in NAMES}


def checkpoint_of(config: dict[str, Any], tensors: Mapping[str, torch.Tensor], specs: Mapping[str, TensorSpec]
                  ) -> Checkpoint:
    def fetch(name: str, start: int | None, stop: int | None) -> torch.Tensor:
        tensor = tensors[name] if name in tensors else torch.zeros(specs[name].shape, dtype=specs[name].dtype)
        return tensor if start is None else tensor[start:stop]

    return Checkpoint("f", "f", "safetensors", config, folder() / "config", dict(specs), fetch, dict)


@target
def config(data: bytes) -> None:
    """config.json beside plain weights: what inspect and the planner of text-free recipes take from it."""
    from qtool.models import outline

    said = checked(parse_json(data, "config.json"), "config.json")
    (folder() / "config").mkdir(exist_ok=True)
    opened = checkpoint_of(said, {}, plain())
    outline.build(folder() / "config", said, plain())
    outline.stated(said)
    source = decode.Source(opened)
    inspect.summary(source)
    footprint.inference(source, 128, 1)


@functools.cache
def packed() -> dict[str, torch.Tensor]:
    """One linear as each format names its tensors, 64 x 64: as far as headers go it could be any of them."""
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "weight": (torch.uint8, (64, 32)), "qweight": (torch.int32, (8, 64)), "qzeros": (torch.int32, (2, 8)),
        "scales": (torch.float16, (2, 64)), "g_idx": (torch.int32, (64,)), "weight_packed": (torch.int32, (64, 8)),
        "weight_scale": (torch.float16, (64, 2)), "weight_shape": (torch.int64, (2,)),
        "biases": (torch.float16, (2, 64)),
        "weight_scale_inv": (torch.float32, (1, 1)), "weight_scale_2": (torch.float32, ()),
        "input_scale": (torch.float32, ()), "weight.absmax": (torch.uint8, (64,)),
        "weight.quant_map": (torch.float32, (16,)), "weight.nested_absmax": (torch.float32, (1,)),
        "weight.nested_quant_map": (torch.float32, (256,)), "SCB": (torch.float32, (64,)),
        "weight.quant_state.bitsandbytes__nf4": (torch.uint8, (80,))}
    return {f"model.layers.0.mlp.up_proj.{key}": torch.ones(shape, dtype=dtype)
            for key, (dtype, shape) in shapes.items()}


@target
def quantization(data: bytes) -> None:
    """quantization_config of other programs. The first byte leaves out some of the tensors that they might be about."""
    said = parse_json(data[1:], "config.json")
    left_out = data[0] if data else 0
    tensors = {name: tensor for place, (name, tensor) in enumerate(packed().items())
               if not left_out or place % 8 != left_out % 8}
    specs = {name: TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    (folder() / "config").mkdir(exist_ok=True)
    source = decode.Source(checkpoint_of({"model_type": "llama", "quantization_config": said}, tensors, specs))
    for linear in source.schemes:
        source.decoded(linear)


@target
def recipes(data: bytes) -> None:
    made = recipe.parse(data.decode(errors="replace"), "r.yaml")
    again = recipe.override(made, {"seed": 1})
    assert again.scheme == made.scheme and isinstance(made.method, str)


@target
def jobs_file(data: bytes) -> None:
    made = jobs.load(file("jobs.yaml", data))
    base = made.out.resolve()
    assert all((made.out / job.output).resolve().is_relative_to(base) for job in made.jobs)


@target
def imatrix(data: bytes) -> None:
    entries = read_imatrix(file("imatrix", data))
    spread(entries, {"model.layers.0.mlp.up_proj.weight": (64, 64)}, "llama", "imatrix")


@target
def tokenizer(data: bytes) -> None:
    """tokenizer.json, as the vocabulary of a GGUF file."""
    path = file("tokenizer/tokenizer.json", data)
    keys = gguf.GGUFWriter(None, "llama")
    gguf_tokenizer.add(keys, path.parent, {"model_type": "llama"}, 512, None)
    assert len(keys.kv_data[0]["tokenizer.ggml.tokens"].value) == 512


@target
def manifests(data: bytes) -> None:
    read = manifest.load(file("manifest/manifest.json", data).parent)
    made_by(read)
    manifest.errors(read["layers"])
    assert card.text({"format": "gptq", **read}, ()).startswith("---\n")


@target
def journal(data: bytes) -> None:
    path = file("out.partial/" + journals.NAME, data)
    with contextlib.suppress(QtoolError):
        journals.identity(path)
    with Workspace(folder() / "out", {"qtool": "1"}):
        pass


@target
def directory(data: bytes) -> None:
    """A model directory of one file: the header with all that the reader asks of it."""
    file("model/config.json", b'{"model_type": "llama"}')
    opened = open_checkpoint(str(file("model/model.safetensors", data).parent))
    for name, spec in opened.specs.items():
        if spec.nbytes <= SMALL:
            opened.read(name)
