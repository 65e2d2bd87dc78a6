"""FP8 in blocks of 128 x 128, as DeepSeek-V3 and Qwen3-FP8 are published. vLLM, SGLang, transformers.

Per linear P of shape [N, K], both multiples of 128:
    P.weight            float8_e4m3fn [N, K]
    P.weight_scale_inv  float32 [N / 128, K / 128], which in spite of its name multiplies
Inputs are rounded at run time, with a scale for each 128 columns of a token (transformers on a CPU leaves them).
Files of others are read too where sides are no multiples of 128, and with one scale per matrix or channel: vLLM calls
it P.weight_scale, and P.input_scale that of static inputs; transformers P.weight_scale_inv and P.activation_scale.
Source: transformers integrations/finegrained_fp8; vLLM quantization/fp8.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from qtool import found
from qtool.errors import CheckpointError, NumericalError
from qtool.formats._defaults import check_together as check_together
from qtool.formats._defaults import extra_files as extra_files
from qtool.formats._small_floats import BLOCK, every_row, from_bits, once, refuse_blocks, shared_shape, to_bits
from qtool.formats._stored import Read, expect, quantization_config, stored_linears
from qtool.formats._targets import fused_conflicts
from qtool.recipe import Scheme
from qtool.tensors import FLOATING, INPUT_SCALE, QuantizedTensor, TensorSpec

__all__ = [
    "LOADERS", "NAME", "SUFFIXES", "check", "check_together", "config", "dequantize", "extra_files", "fused_conflicts",
    "layout", "notes", "obstacle", "pack", "recognises", "scale_dtype", "schemes", "unpack",
]
NAME = "fp8"
SCALES, INPUT_SCALES = ("weight_scale_inv", "weight_scale"), (INPUT_SCALE, "activation_scale")
SUFFIXES = ("weight", *SCALES, *INPUT_SCALES)
SCHEME = Scheme(grid="fp8", bits=8, group_size=128, strategy="block", activations="group")
LOADERS = (
    ("vLLM", "from vllm import LLM\nllm = LLM(\"DIR\")\nprint(llm.generate(\"Hello\")[0].outputs[0].text)"),
    ("transformers", "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
                     "model = AutoModelForCausalLM.from_pretrained(\"DIR\", dtype=\"auto\")\n"
                     "tokenizer = AutoTokenizer.from_pretrained(\"DIR\")"),
)


def check(scheme: Scheme, linear_name: str, shape: tuple[int, int]) -> str | None:
    """Why a linear [N, K] cannot be held, with the nearest scheme that works; None when it can."""
    if scheme != SCHEME:
        return (f"format {NAME} holds blocks of 128 x 128 with inputs rounded per group (--method fp8-block), not the "
                f"{scheme.label} of {linear_name}; nearest: --format compressed-tensors")
    return refuse_blocks(f"format {NAME}", linear_name, shape)


def notes(schemes: Mapping[str, Scheme]) -> list[str]:
    return ["transformers on a CPU reads these weights but leaves the inputs unrounded; vLLM and SGLang round them"]


def scale_dtype(model_dtype: torch.dtype) -> torch.dtype:
    """Scales are float32 whatever the dtype of the model."""
    return torch.float32


def layout(linear_name: str, shape: tuple[int, int], scheme: Scheme, model_dtype: torch.dtype) -> list[TensorSpec]:
    """Names, dtypes and shapes of the tensors of one linear [N, K]."""
    return [TensorSpec(f"{linear_name}.weight", torch.float8_e4m3fn, tuple(shape)),
            TensorSpec(f"{linear_name}.weight_scale_inv", torch.float32, shared_shape(scheme, shape))]


def pack(linear_name: str, tensor: QuantizedTensor, model_dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """The tensors that layout announced. Raises NumericalError for a scale that is not finite."""
    if not bool(torch.isfinite(tensor.scale).all()):
        raise NumericalError(f"{linear_name}: a scale is not finite; leave this linear unquantized with a rule")
    return {f"{linear_name}.weight": to_bits(tensor).view(torch.float8_e4m3fn),
            f"{linear_name}.weight_scale_inv": once(tensor.scale.float(), "block")}


def unpack(linear_name: str, read: Read, scheme: Scheme, shape: tuple[int, int],
           config: Mapping[str, Any] | None = None) -> QuantizedTensor:
    """The codes and scales of one linear [N, K]; CheckpointError for blocks that are cut off."""
    reason = obstacle(linear_name, read, scheme, shape)
    if reason:
        raise CheckpointError(f"{linear_name}: {reason}; read it as dense weights instead (qtool export --to hf)")
    where = f"{linear_name}.weight"
    bits = expect(where, read(where), (torch.float8_e4m3fn,), shape).view(torch.uint8)
    stored = _first(linear_name, read, SCALES)
    stored = stored.reshape(-1, 1) if scheme.strategy is None and stored.dim() < 2 else stored
    scale = every_row(f"{where}_scale", stored, scheme, shape).contiguous()
    group = 128 if scheme.strategy == "block" else shape[1]
    codes = from_bits(linear_name, bits, "fp8")
    fitted: QuantizedTensor = found.load("grids", "fp8").GRID.fitted(scale, group, codes, scheme.strategy)
    if scheme.activations != "tensor":
        return fitted
    return replace(fitted, extra={INPUT_SCALE: _first(linear_name, read, INPUT_SCALES).float().reshape(1)})


def obstacle(linear_name: str, read: Read, scheme: Scheme, shape: tuple[int, int],
             config: Mapping[str, Any] | None = None) -> str | None:
    """Why the codes cannot be kept as they are in another format, or None."""
    odd = scheme.strategy == "block" and (shape[0] % BLOCK or shape[1] % BLOCK)
    return "its last blocks of 128 x 128 are cut off, so its codes cannot be kept as they are" if odd else None


def dequantize(linear_name: str, read: Read, scheme: Scheme, shape: tuple[int, int],
               config: Mapping[str, Any] | None = None) -> torch.Tensor:
    """float32 [N, K]."""
    if obstacle(linear_name, read, scheme, shape) is None:
        decoded: torch.Tensor = found.load("grids", "fp8").decode(unpack(linear_name, read, scheme, shape, config))
        return decoded
    where, (rows, columns) = f"{linear_name}.weight", shape
    values = expect(where, read(where), (torch.float8_e4m3fn,), shape).float()
    scale = expect(f"{where}_scale_inv", _first(linear_name, read, SCALES), FLOATING,
                   (-(-rows // BLOCK), -(-columns // BLOCK))).float()
    return values * scale.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]


def config(schemes: Mapping[str, Scheme], skipped: Sequence[str], step_names: Sequence[str] = ()) -> dict[str, Any]:
    """The quantization_config. `skipped`: every other nn.Linear."""
    return {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
            "modules_to_not_convert": list(dict.fromkeys([*skipped, "lm_head"]))}


def recognises(config: Mapping[str, Any]) -> bool:
    """Whether this config.json says FP8 (of any kind; schemes() refuses the kinds that are not read)."""
    return quantization_config(config).get("quant_method") == "fp8"


def schemes(config: Mapping[str, Any], specs: Mapping[str, TensorSpec],
            read: Read | None = None) -> dict[str, tuple[Scheme, tuple[int, int]]]:
    """Scheme and [N, K] of every quantized linear, from config.json and the headers; raises CheckpointError."""
    said = quantization_config(config)
    kind = said.get("weight_block_size"), said.get("activation_scheme", "dynamic"), said.get("scale_fmt")
    if kind[0] not in (None, [BLOCK, BLOCK]) or kind[1] not in ("dynamic", "static") or kind[2] not in (None, "float"):
        raise CheckpointError(f"config.json: FP8 with weight_block_size {kind[0]}, activation_scheme {kind[1]!r}, "
                              f"scale_fmt {kind[2]!r} is not read (read: blocks of 128 x 128 or none, dynamic or "
                              "static, floating scales); start from the unquantized model")
    named = {name: spec for suffix in reversed(SCALES) for name in stored_linears(specs, suffix)
             for spec in [specs[f"{name}.{suffix}"]]}
    found_schemes = {name: _scheme(name, scale, kind[0] is not None, kind[1] == "static", specs)
                     for name, scale in named.items()}
    if not found_schemes:
        raise CheckpointError("config.json says FP8, but no tensor is called *.weight_scale_inv or *.weight_scale; "
                              "fetch the model again")
    return found_schemes


def _scheme(linear_name: str, scale: TensorSpec, blocks: bool, static: bool,
            specs: Mapping[str, TensorSpec]) -> tuple[Scheme, tuple[int, int]]:
    weight = specs.get(f"{linear_name}.weight")
    shape = weight.shape if weight is not None else ()
    if len(shape) != 2 or weight is None or weight.dtype is not torch.float8_e4m3fn:
        raise CheckpointError(f"{linear_name}: weight {list(shape)} has a scale, but is no float8_e4m3fn matrix; start "
                              "from the unquantized model")
    size = shape[0], shape[1]
    if blocks:
        return SCHEME, size
    plain = Scheme(grid="fp8", bits=8, group_size=-1, activations="tensor" if static else "token")
    if scale.elements == 1:
        return plain.model_copy(update={"strategy": "tensor"}), size
    if scale.elements == size[0]:
        return plain, size
    raise CheckpointError(f"{linear_name}: its {scale.elements} scales are neither one for the matrix nor one for each "
                          f"of its {size[0]} rows; the file does not fit the quantization_config in config.json")


def _first(linear_name: str, read: Read, suffixes: Sequence[str]) -> torch.Tensor:
    """The tensor under the first of the names that there is."""
    for suffix in suffixes:
        try:
            return read(f"{linear_name}.{suffix}")
        except KeyError:
            continue
    raise CheckpointError(f"{linear_name} has none of {', '.join(suffixes)}; the checkpoint is incomplete")
