"""AWQ's "gemm" layout: 4-bit asymmetric groups. GPTQModel, transformers (through it), vLLM, SGLang.

Per linear P of shape [N, K] with G groups along K:
    P.qweight  int32 [K, N / 8]   eight codes a word along N: columns 0, 2, 4, 6, 1, 3, 5, 7 from the lowest nibble on
    P.qzeros   int32 [G, N / 8]   zero points in the same order, without GPTQ's offset of one
    P.scales   float16 [G, N]
W[n, k] = (code - zero) * scale. A symmetric grid is written with its zero point, 8.
Source: autoawq modules/linear/gemm.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from qtool import ops
from qtool.errors import CheckpointError
from qtool.formats._defaults import extra_files as extra_files
from qtool.formats._defaults import notes as notes
from qtool.formats._stored import (
    Read,
    Stored,
    expect,
    packable,
    quantization_config,
    refuse,
    refuse_odd,
    scheme_of,
    stored_linears,
)
from qtool.formats._targets import fused_conflicts, patterns, with_fused
from qtool.ops import int4 as layouts
from qtool.recipe import Scheme
from qtool.tensors import FLOATING, QuantizedTensor, TensorSpec, group_count

__all__ = [
    "LOADERS", "NAME", "SUFFIXES", "check", "check_together", "config", "dequantize", "extra_files", "fused_conflicts",
    "int4", "layout", "notes", "pack", "recognises", "scale_dtype", "schemes", "unpack",
]
NAME = "awq"
SUFFIXES = ("qweight", "qzeros", "scales")
BITS, PER_WORD = 4, 8
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # of the columns in a word, from the lowest nibble on
NATURAL = tuple(map(ORDER.index, range(PER_WORD)))
ALL_EIGHT = 0x88888888 - (1 << 32)  # as int32
GROUP_SIZES = (-1, 16, 32, 64, 128)
LOADERS = (
    ("GPTQModel", "from gptqmodel import GPTQModel\nmodel = GPTQModel.load(\"DIR\")\n"
                  "print(model.tokenizer.decode(model.generate(\"Hello\")[0]))"),
    ("vLLM", "from vllm import LLM\nllm = LLM(\"DIR\")\nprint(llm.generate(\"Hello\")[0].outputs[0].text)"),
)


def check(scheme: Scheme, linear_name: str, shape: tuple[int, int]) -> str | None:
    """Why a linear [N, K] cannot be held, with the nearest that works; None when it can."""
    reason = refuse(NAME, scheme, linear_name, shape)
    if reason is None and scheme.bits != BITS:
        reason = f"{NAME} holds 4 bits, not the {scheme.bits} of {linear_name}; nearest: --bits 4, or another --format"
    reason = reason or refuse_odd(NAME, linear_name, shape)
    if reason is None and scheme.group_size not in GROUP_SIZES:
        reason = (f"no program loads {NAME} files with group_size {scheme.group_size} ({linear_name}); sizes that "
                  f"load: {', '.join(map(str, GROUP_SIZES))}")
    return reason


def check_together(schemes: Mapping[str, Scheme], others: Collection[str] = ()) -> str | None:
    """Why these linears cannot share a checkpoint: config.json names one group size for all."""
    sizes = {scheme.group_size: name for name, scheme in schemes.items()}
    if len(sizes) < 2:
        return None
    (first, one), (second, other) = list(sizes.items())[:2]
    return (f"{NAME} has one group size per checkpoint, but {one} has {first} and {other} has {second}; nearest: make "
            "them the same, or --format compressed-tensors")


def scale_dtype(model_dtype: torch.dtype) -> torch.dtype:
    """Scales are float16 whatever the dtype of the model."""
    return torch.float16


def layout(linear_name: str, shape: tuple[int, int], scheme: Scheme, model_dtype: torch.dtype) -> list[TensorSpec]:
    """Names, dtypes and shapes of the tensors of one linear [N, K]; a bias stays under its own name."""
    rows, columns = shape
    groups = group_count(columns, int(scheme.group_size))
    return [TensorSpec(f"{linear_name}.qweight", torch.int32, (columns, rows // PER_WORD)),
            TensorSpec(f"{linear_name}.qzeros", torch.int32, (groups, rows // PER_WORD)),
            TensorSpec(f"{linear_name}.scales", torch.float16, (groups, rows))]


def pack(linear_name: str, tensor: QuantizedTensor, model_dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """The tensors that layout announced. Raises NumericalError for a scale that float16 cannot hold exactly."""
    scale = packable(linear_name, tensor, torch.float16)
    return {f"{linear_name}.qweight": _pack(tensor.codes), f"{linear_name}.qzeros": _pack(tensor.zero_point),
            f"{linear_name}.scales": scale.T.contiguous()}


def unpack(linear_name: str, read: Read, scheme: Scheme, shape: tuple[int, int],
           config: Mapping[str, Any] | None = None) -> QuantizedTensor:
    """The codes and scales of one linear [N, K]."""
    return _stored(linear_name, read, scheme, shape, config).quantized(linear_name, scheme)


def dequantize(linear_name: str, read: Read, scheme: Scheme, shape: tuple[int, int],
               config: Mapping[str, Any] | None = None) -> torch.Tensor:
    """float32 [N, K]."""
    return _stored(linear_name, read, scheme, shape, config).dequantize()


def int4(linear_name: str, config: Mapping[str, Any] | None = None) -> tuple[str, int]:
    """The tensor with the codes of a linear, and its layout."""
    return f"{linear_name}.qweight", layouts.ALONG_ROWS if _version(config or {}) == "gemv" else layouts.AWQ


def config(schemes: Mapping[str, Scheme], skipped: Sequence[str], step_names: Sequence[str] = ()) -> dict[str, Any]:
    """The quantization_config. `skipped`: every other nn.Linear."""
    group_size = next(iter(schemes.values())).group_size
    result = {"quant_method": "awq", "bits": BITS, "group_size": group_size, "zero_point": True, "version": "gemm",
              "modules_to_not_convert": list(dict.fromkeys([*skipped, "lm_head"]))}
    left = [name for name in skipped if name != "lm_head"]
    if left:  # GPTQModel follows this list, not the other
        result["dynamic"] = {f"-:{pattern}": {} for pattern in patterns(with_fused(left), with_fused(list(schemes)))}
    return result


def recognises(config: Mapping[str, Any]) -> bool:
    """Whether this config.json says AWQ."""
    return quantization_config(config).get("quant_method") == "awq"


def schemes(config: Mapping[str, Any], specs: Mapping[str, TensorSpec],
            read: Read | None = None) -> dict[str, tuple[Scheme, tuple[int, int]]]:
    """Scheme and [N, K] of every quantized linear, from config.json, the headers and, with `read`, the zero points.

    Raises CheckpointError.
    """
    said = quantization_config(config)
    version, bits = _version(config), said.get("bits", said.get("w_bit"))
    if version not in ("gemm", "gemv") or bits != BITS:
        raise CheckpointError(f"config.json: AWQ version {version!r} with {bits} bits: only gemm and gemv with 4 bits "
                              "are read; start from the unquantized model")
    size = said.get("group_size", said.get("q_group_size", 128))
    found = {}
    for name in stored_linears(specs, "qweight"):
        words, scales = specs[f"{name}.qweight"].shape, specs.get(f"{name}.scales")
        rows = words[-1] * PER_WORD if version == "gemm" else words[0]
        if len(words) != 2 or scales is None or scales.shape[1 if version == "gemm" else 0:][:1] != (rows,):
            raise CheckpointError(f"{name}: qweight {list(words)} and scales do not fit each other; "
                                  "the file is damaged")
        # config.json cannot say that a grid is symmetric: its zero points do
        zeros = read(f"{name}.qzeros") if read is not None else None
        symmetric = zeros is not None and bool((zeros == ALL_EIGHT).all())
        shape = (rows, words[0]) if version == "gemm" else (rows, words[1] * PER_WORD)
        found[name] = scheme_of(name, BITS, size, symmetric), shape
    if not found:
        raise CheckpointError("config.json says AWQ, but no tensor is called *.qweight; fetch the model again")
    return found


def _version(config: Mapping[str, Any]) -> str:
    return str(quantization_config(config).get("version", "gemm")).lower()


def _pack(codes: torch.Tensor) -> torch.Tensor:
    """uint8 [N, any] -> int32 [any, N / 8]."""
    return ops.pack_bits(_reordered(codes, ORDER), BITS, transposed=True).T.contiguous()


def _unpack(words: torch.Tensor) -> torch.Tensor:
    """int32 [any, N / 8] -> uint8 [N, any]."""
    return _reordered(ops.unpack_bits(words.T, BITS, words.shape[1] * PER_WORD, transposed=True), NATURAL)


def _reordered(codes: torch.Tensor, order: Sequence[int]) -> torch.Tensor:
    """The rows of each eight in that order."""
    eights = codes.reshape(-1, PER_WORD, codes.shape[1])
    return torch.stack([eights[:, row] for row in order], 1).reshape(codes.shape)


def _gemv(linear_name: str, read: Read, shape: tuple[int, int], groups: int) -> Stored:
    """The older layout: rows as they are, natural order; zero points and scales padded to whole words and more."""
    rows, columns = shape
    words, zeros, scale = (read(f"{linear_name}.{suffix}") for suffix in SUFFIXES)
    expect(f"{linear_name}.qweight", words, (torch.int32,), (rows, columns // PER_WORD))
    width = zeros.shape[-1] if zeros.dim() == 2 else 0
    expect(f"{linear_name}.qzeros", zeros, (torch.int32,), (rows, max(width, -(-groups // PER_WORD))))
    expect(f"{linear_name}.scales", scale, FLOATING, (rows, width * PER_WORD))
    return Stored(ops.unpack_bits(words, BITS, columns), scale[:, :groups].contiguous(),
                  ops.unpack_bits(zeros, BITS, width * PER_WORD)[:, :groups].contiguous())


def _stored(linear_name: str, read: Read, scheme: Scheme, shape: tuple[int, int],
            config: Mapping[str, Any] | None) -> Stored:
    rows, columns = shape
    size = columns if scheme.group_size == -1 else int(scheme.group_size)
    if columns % size:
        raise CheckpointError(f"{linear_name}: groups of {size} do not divide {columns} inputs; config.json belongs to "
                              "another file")
    groups, where = columns // size, [f"{linear_name}.{suffix}" for suffix in SUFFIXES]
    if _version(config or {}) == "gemv":
        return _gemv(linear_name, read, shape, groups)
    words = expect(where[0], read(where[0]), (torch.int32,), (columns, rows // PER_WORD))
    zeros = expect(where[1], read(where[1]), (torch.int32,), (groups, rows // PER_WORD))
    scale = expect(where[2], read(where[2]), FLOATING, (groups, rows))
    return Stored(_unpack(words), scale.T.contiguous(), _unpack(zeros))
