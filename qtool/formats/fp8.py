"""FP8 in blocks of 128 x 128, as DeepSeek-V3 and Qwen3-FP8 are published. vLLM, SGLang, transformers.

Per linear P of shape [N, K], both multiples of 128:
    P.weight            float8_e4m3fn [N, K]
    P.weight_scale_inv  float32 [N / 128, K / 128], which in spite of its name multiplies
Inputs are rounded at run time, with a scale for each 128 columns of a token (transformers on a CPU leaves them).
Source: transformers integrations/finegrained_fp8; vLLM quantization/fp8.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from qtool import found
from qtool.errors import CheckpointError, NumericalError
from qtool.formats._small_floats import every_row, from_bits, once, refuse_blocks, shared_shape, to_bits
from qtool.formats._stored import Read, expect, quantization_config, stored_linears
from qtool.formats._targets import fused_conflicts
from qtool.recipe import Scheme
from qtool.tensors import QuantizedTensor, TensorSpec

__all__ = [
    "LOADERS", "NAME", "SUFFIXES", "check", "check_together", "config", "dequantize", "extra_files", "fused_conflicts",
    "layout", "notes", "pack", "recognises", "scale_dtype", "schemes", "unpack",
]
NAME = "fp8"
SUFFIXES = ("weight", "weight_scale_inv")
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


def check_together(schemes: Mapping[str, Scheme]) -> str | None:
    """Why these linears cannot share a checkpoint: they always can."""
    return None


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
    """The codes and scales of one linear [N, K]."""
    where = f"{linear_name}.weight"
    bits = expect(where, read(where), (torch.float8_e4m3fn,), shape).view(torch.uint8)
    scale = every_row(where + "_scale_inv", read(where + "_scale_inv"), scheme, shape)
    grid = found.load("grids", "fp8").GRID
    fitted: QuantizedTensor = grid.fitted(scale, 128, from_bits(linear_name, bits, "fp8"), "block")
    return fitted


def dequantize(linear_name: str, read: Read, scheme: Scheme, shape: tuple[int, int],
               config: Mapping[str, Any] | None = None) -> torch.Tensor:
    """float32 [N, K]."""
    decoded: torch.Tensor = found.load("grids", "fp8").decode(unpack(linear_name, read, scheme, shape, config))
    return decoded


def config(schemes: Mapping[str, Scheme], skipped: Sequence[str], step_names: Sequence[str] = ()) -> dict[str, Any]:
    """The quantization_config. `skipped`: every other nn.Linear."""
    return {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
            "modules_to_not_convert": list(dict.fromkeys([*skipped, "lm_head"]))}


def extra_files(quantization_config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """No files beside config.json."""
    return {}


def recognises(config: Mapping[str, Any]) -> bool:
    """Whether this config.json says FP8 (of any kind; schemes() refuses the kinds that are not read)."""
    return quantization_config(config).get("quant_method") == "fp8"


def schemes(config: Mapping[str, Any], specs: Mapping[str, TensorSpec],
            read: Read | None = None) -> dict[str, tuple[Scheme, tuple[int, int]]]:
    """Scheme and [N, K] of every quantized linear, from config.json and the headers; raises CheckpointError."""
    said = quantization_config(config)
    kind = said.get("weight_block_size"), said.get("activation_scheme", "dynamic"), said.get("scale_fmt")
    if kind not in (([128, 128], "dynamic", None), ([128, 128], "dynamic", "float")):
        raise CheckpointError(f"config.json: FP8 with weight_block_size {kind[0]}, activation_scheme {kind[1]!r}, "
                              f"scale_fmt {kind[2]!r} is not read (read: blocks of 128 x 128, dynamic, float32 "
                              "scales); start from the unquantized model")
    found_schemes = {}
    for name in stored_linears(specs, "weight_scale_inv"):
        weight = specs.get(f"{name}.weight")
        shape = weight.shape if weight is not None else ()
        if len(shape) != 2 or shape[0] % 128 or shape[1] % 128:
            raise CheckpointError(f"{name}: weight {list(shape)} has a weight_scale_inv, but sides that are no "
                                  "multiples of 128 are not read; start from the unquantized model")
        found_schemes[name] = SCHEME, (shape[0], shape[1])
    if not found_schemes:
        raise CheckpointError("config.json says FP8, but no tensor is called *.weight_scale_inv; fetch the model again")
    return found_schemes
