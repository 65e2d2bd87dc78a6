"""A checkpoint as a transformers module whose linears compute with the weights as they are stored."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from qtool import decode, devices
from qtool.decode import Source
from qtool.formats import gguf
from qtool.grids import ggml
from qtool.models import skeleton as skeletons
from qtool.models.skeleton import Skeleton
from qtool.models.whole import generation_defaults, load_model
from qtool.ops.packed import pack_dense
from qtool.runtime import weights
from qtool.runtime.linear import PackedLinear, stored_linear


@dataclass
class Running:
    """What computes each linear of a loaded model, by path. packed: its scheme.  dense: why it is dense."""

    packed: dict[str, str] = field(default_factory=dict)
    dense: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        kinds = [*(f"{count} as {label}" for label, count in Counter(self.packed.values()).items()),
                 *(f"{count} dense ({reason})" for reason, count in Counter(self.dense.values()).items())]
        return "linears: " + ", ".join(kinds)


def load(path: str, device: str = "auto", dtype: torch.dtype | None = None) -> nn.Module:
    """The model at `path` (a directory, a .gguf file or a Hub id) as a transformers module, for notebooks.

    Quantized linears hold their weights packed and round their inputs where their scheme says so; a linear whose
    storage no product knows is dense. `model.running` says which is what. Keys and values are kept in `dtype`, also
    where the checkpoint has scales for a cache in FP8.
    device: auto, cpu, cuda, cuda:1. dtype: of activations; float32 on a CPU, else the model's.
    Raises CheckpointError, ModelError, InputError.
    """
    source = decode.open_model(path)
    bones = skeletons.build(source.directory, source.config, source.specs)
    return fill(bones, source, devices.refuse_missing(devices.named(device)), dtype)


def fill(bones: Skeleton, source: Source, device: torch.device, dtype: torch.dtype | None = None) -> nn.Module:
    """The same for a skeleton, which is used up."""
    dtype = dtype or (torch.float32 if device.type == "cpu" else source.dtype)
    running = Running()
    names = [name for index in range(len(bones.blocks)) for name in bones.block_linears(index)]
    head = [path for path, module in bones.model.named_modules()
            if module is bones.model.get_output_embeddings()]  # type: ignore[operator]
    for name in [*names, *head]:
        linear = _linear(bones, source, name, device, running)
        if linear is not None:
            parent, _, last = name.rpartition(".")
            setattr(bones.model.get_submodule(parent), last, linear)
    model = load_model(bones, source.read, device, dtype)
    generation_defaults(model, source.directory)
    model.running = running  # type: ignore[assignment]
    return model


def _linear(bones: Skeleton, source: Source, name: str, device: torch.device, running: Running) -> nn.Module | None:
    """What stands for the linear at path `name`; None: a dense one as transformers has it."""
    stored = bones.stored(name)
    biased = bones.model.get_submodule(name).bias is not None
    bias = source.read(bones.source(f"{name}.bias")).to(device) if biased else None
    scheme, tensor, reason = _stored(source, stored)
    if not reason:
        reason = weights.obstacle(tensor) or ""
    if not reason:
        running.packed[name] = scheme.label
        return stored_linear(tensor.to(device), bias, scheme, lambda one: weights.pack(one).to(device))
    running.dense[name] = reason
    if device.type != "cpu":
        return None
    return PackedLinear(pack_dense(source.read(f"{stored}.weight")), bias, source.schemes.get(stored))


def _stored(source: Source, linear: str) -> tuple[Any, Any, str]:
    """Scheme and tensor of a quantized linear; the third says why there is none."""
    if linear in source.schemes:
        reason = source.obstacle(linear) or ""
        return source.schemes[linear], None if reason else source.read_quantized(linear), reason
    kind, _ = source.checkpoint.block_types.get(f"{linear}.weight", ("", 0))
    fetch = source.checkpoint.fetch_blocks
    if not kind or fetch is None:
        return None, None, "not quantized"
    if kind not in ggml.MEMBERS:
        return None, None, f"type {kind} is only read"
    scheme, shape = ggml.MEMBERS[kind].scheme, source.specs[f"{linear}.weight"].shape
    return scheme, gguf.unpack(linear, lambda name: fetch(name), scheme, (shape[0], shape[1])), ""
