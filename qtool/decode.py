"""Reads any checkpoint as dense weights: a quantized one is decoded tensor by tensor, a dense one passes through."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from qtool import formats, repacking
from qtool.checkpoint import open_checkpoint, stacks
from qtool.checkpoint.header import AGAIN, read_json
from qtool.checkpoint.reader import Checkpoint
from qtool.errors import CheckpointError, InputError
from qtool.explained import Explained
from qtool.recipe import Scheme
from qtool.repacking import Route
from qtool.tensors import DTYPE_NAMES, FLOATING, QuantizedTensor, TensorSpec


class Source:
    """A checkpoint seen as dense weights, with the members of a Checkpoint.

    schemes: Scheme of every quantized linear (empty when there is none).  format: the module of its format, or None.
    specs: the dense view: P.weight [N, K] in the model's dtype in place of the packed tensors of P.
    config: config.json without its quantization_config.  checkpoint: what lies on disk.  notes: what reading changed.
    """

    notes: tuple[str, ...] = ()

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.origin, self.name, self.kind = checkpoint.origin, checkpoint.name, checkpoint.kind
        self.directory: Path = checkpoint.directory
        self.config: dict[str, Any] = _without_quantization(checkpoint.config)
        self._stored_config = _stored_config(checkpoint)
        quantization = formats.quantization_config(self._stored_config)
        self._linears: dict[str, tuple[Scheme, tuple[int, int]]] = {}
        self.format: ModuleType | None = None
        with Explained(Path(checkpoint.origin), "its quantization_config is not understood", AGAIN):
            self.format = formats.recognise(self._stored_config)
            if self.format is not None:
                self.checkpoint = stacks.unstacked(checkpoint, formats.members(self.format))
                self._linears = self.format.schemes(self._stored_config, self.checkpoint.specs, self._read_stored)
        if self.format is None and quantization:
            raise CheckpointError(
                f"{checkpoint.origin}: config.json says it is quantized with {quantization.get('quant_method')!r}, "
                f"which is not read (read: {', '.join(formats.names())}); start from the unquantized model")
        self.schemes = {name: scheme for name, (scheme, _) in self._linears.items()}
        self.dtype = model_dtype(checkpoint.config, self.checkpoint.specs)
        self.specs = self._dense_specs()

    def read(self, name: str) -> torch.Tensor:
        """The tensor `name` of specs, contiguous on the CPU; a quantized weight is decoded to the model's dtype."""
        linear = self._linear_of(name)
        return self.checkpoint.read(name) if linear is None else self.decoded(linear).to(self.dtype)

    def decoded(self, linear_name: str) -> torch.Tensor:
        """float32 [N, K] of a linear, quantized or not, before any rounding to the model's dtype."""
        if linear_name not in self._linears:
            return self.checkpoint.read(f"{linear_name}.weight").float()
        assert self.format is not None
        scheme, shape = self._linears[linear_name]
        with self._all_there():
            dense: torch.Tensor = self.format.dequantize(linear_name, self._read_stored, scheme, shape,
                                                         self._stored_config)
        return dense

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows start .. stop of a 2-D tensor; of a quantized one the whole is decoded first."""
        if self._linear_of(name) is None:
            return self.checkpoint.read_rows(name, start, stop)
        return self.read(name)[start:stop].clone()

    def read_quantized(self, linear_name: str, unread: str | None = None) -> QuantizedTensor:
        """Codes and scales of one quantized linear. InputError when it is not quantized, or when its columns are in an
        order that a QuantizedTensor does not express (read() decodes those too).

        unread: the stored tensor with its codes, which then have a shape and no data (on the device meta).
        """
        if linear_name not in self._linears:
            raise InputError(f"{linear_name} is not quantized in {self.origin}; read {linear_name}.weight instead")
        assert self.format is not None
        scheme, shape = self._linears[linear_name]
        with self._all_there():
            tensor: QuantizedTensor = self.format.unpack(linear_name, lambda name: self._read_stored(name, unread),
                                                         scheme, shape, self._stored_config)
        return tensor

    def stored_scale(self, linear_name: str) -> torch.Tensor:
        """The scales of a quantized linear: the first floating tensor among its own, as the file has it."""
        assert self.format is not None
        stored = self.checkpoint.specs
        names = (f"{linear_name}.{suffix}" for suffix in self.format.SUFFIXES)
        return self.checkpoint.read(next(name for name in names if name in stored and stored[name].dtype in FLOATING))

    def obstacle(self, linear_name: str) -> str | None:
        """Why the codes of a quantized linear cannot be kept as they are in another format, or None."""
        ask = getattr(self.format, "obstacle", None)
        scheme, shape = self._linears[linear_name]
        return ask(linear_name, self._read_stored, scheme, shape, self._stored_config) if ask else None

    def cache_scales(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Attention module -> float32 [1] scales of the keys and values that it keeps; empty where there are none.

        Raises CheckpointError for one that is no positive number.
        """
        found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        first, second = getattr(self.format, "KV_SCALES", ("", ""))
        for name in self.checkpoint.specs if first else ():
            module = name.removesuffix(f".{first}")
            if module != name and f"{module}.{second}" in self.checkpoint.specs:
                keys, values = (self.checkpoint.read(f"{module}.{one}").float().reshape(-1) for one in (first, second))
                if any(one.numel() != 1 or not 0 < float(one) < float("inf") for one in (keys, values)):
                    raise CheckpointError(f"{module}: {first} and {second} are not positive; the file is damaged")
                found[module] = keys, values
        return found

    def route(self, linear_name: str, target: ModuleType, scheme: Scheme) -> Route | None:
        """How the words of a quantized linear's codes become those of another format without being unpacked, if so."""
        return repacking.route(linear_name, scheme, self.specs[f"{linear_name}.weight"].shape, self.format, target,
                               self._stored_config)

    def quantization(self) -> Mapping[str, Any]:
        """The quantization_config, wherever the checkpoint keeps it; {} when there is none."""
        return formats.quantization_config(self._stored_config)

    def weight_bytes(self) -> int:
        """Bytes of all tensors on disk."""
        return sum(spec.nbytes for spec in self.checkpoint.specs.values())

    def companions(self) -> list[Path]:
        return self.checkpoint.companions()

    def hashes(self) -> dict[str, str]:
        return self.checkpoint.hashes()

    def close(self) -> None:
        self.checkpoint.close()

    def as_checkpoint(self) -> Checkpoint:
        """The dense view as what every recipe reads; origin and hashes are those of the files."""
        def fetch(name: str, start: int | None, stop: int | None) -> torch.Tensor:
            return self.read(name) if start is None or stop is None else self.read_rows(name, start, stop)

        return Checkpoint(self.origin, self.name, self.kind, self.config, self.directory, self.specs, fetch,
                          self.hashes)

    def _linear_of(self, name: str) -> str | None:
        linear = name.removesuffix(".weight")
        return linear if linear != name and linear in self._linears else None

    @contextmanager
    def _all_there(self) -> Iterator[None]:
        """A tensor that a format asks for and does not find is an error of the checkpoint."""
        try:
            yield
        except KeyError as missing:
            raise CheckpointError(f"{self.origin}: {missing.args[0]} is missing; the download is incomplete, or "
                                  "config.json belongs to another file") from None

    def _read_stored(self, name: str, unread: str | None = None) -> torch.Tensor:
        if name not in self.checkpoint.specs:
            raise KeyError(name)
        if name == unread:
            spec = self.checkpoint.specs[name]
            return torch.empty(spec.shape, dtype=spec.dtype, device="meta")
        return self.checkpoint.read(name)

    def _dense_specs(self) -> dict[str, TensorSpec]:
        suffixes = self.format.SUFFIXES if self.format is not None else ()
        packed = {f"{linear}.{suffix}" for linear in self._linears for suffix in suffixes}
        beside = getattr(self.format, "KV_SCALES", ())  # for engines; no parameters of the model
        specs = {name: replace(spec, stack=None) for name, spec in self.checkpoint.specs.items()
                 if name not in packed and not name.endswith(tuple(f".{one}" for one in beside))}
        for linear, (_, shape) in self._linears.items():
            specs[f"{linear}.weight"] = TensorSpec(f"{linear}.weight", self.dtype, shape)
        return dict(sorted(specs.items()))


def open_model(path: str, revision: str | None = None, work_dir: Path | None = None,
               gguf_dtype: torch.dtype | None = None) -> Source:
    """Open a directory, a .gguf file or a Hub id, quantized or not; as open_checkpoint. Raises CheckpointError."""
    return Source(open_checkpoint(path, revision, work_dir, gguf_dtype))


def model_dtype(config: Mapping[str, Any], specs: Mapping[str, TensorSpec]) -> torch.dtype:
    """The dtype in which the model computes: config.json's, else that of its first two-dimensional float tensor."""
    text = config.get("text_config")
    for holder in (config, text if isinstance(text, Mapping) else {}):
        name = str(holder.get("dtype") or holder.get("torch_dtype") or "").removeprefix("torch.")
        found = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPE_NAMES.values()}.get(name)
        if found in FLOATING:
            return found
    dense = [spec.dtype for spec in specs.values() if spec.dtype in FLOATING and len(spec.shape) == 2]
    return dense[0] if dense else torch.float32


def _without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    keys = formats.QUANTIZATION_KEYS
    plain = {key: value for key, value in config.items() if key not in keys}
    if isinstance(plain.get("text_config"), Mapping):
        plain["text_config"] = {key: value for key, value in plain["text_config"].items() if key not in keys}
    return plain


BESIDE = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}


def _stored_config(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """config.json; old GPTQ, AWQ and ModelOpt checkpoints keep their quantization_config in a file beside it."""
    there = [name for name in BESIDE if (checkpoint.directory / name).is_file()]
    if _without_quantization(checkpoint.config) != checkpoint.config or not there:
        return checkpoint.config
    beside = checkpoint.directory / there[0]
    return {"quant_method": BESIDE[beside.name], **read_json(beside)}
