"""ModelOpt's unified checkpoints, FP8 and NVFP4: TensorRT-LLM, vLLM, SGLang.

Per linear P of shape [N, K]:
    FP8    P.weight float8_e4m3fn [N, K];  P.weight_scale, P.input_scale float32 [], which multiply
    NVFP4  P.weight uint8 [N, K / 2], low nibble first;  P.weight_scale float8_e4m3fn [N, K / 16];
           P.weight_scale_2 float32 [], which multiplies, where compressed-tensors divides by its weight_global_scale
Per attention: k_proj.k_scale and v_proj.v_scale, float32 []. config.json says it in quantization_config, and so does
hf_quant_config.json, where older readers look.
Source: nvidia-modelopt 0.47 export/{quant_utils, convert_hf_config}; vLLM 0.32 quantization/modelopt.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

import qtool
from qtool import found
from qtool.errors import CheckpointError, NumericalError, PlanError
from qtool.formats._small_floats import every_row, from_bits, once, to_bits
from qtool.formats._stored import Read, expect, nearest_group, quantization_config, stored_linears
from qtool.formats._targets import fused_conflicts
from qtool.recipe import Scheme
from qtool.tensors import INPUT_SCALE, QuantizedTensor, TensorSpec

__all__ = [
    "KV_SCALES", "LOADERS", "NAME", "SUFFIXES", "check", "check_together", "config", "dequantize", "extra_files",
    "fused_conflicts", "kv_scales", "layout", "notes", "obstacle", "pack", "recognises", "scale_dtype", "schemes",
    "unpack", "with_kv_cache",
]
NAME = "modelopt"
SUFFIXES = ("weight", "weight_scale", "weight_scale_2", INPUT_SCALE)
KV_SCALES = ("k_proj.k_scale", "v_proj.v_scale")
FILE = "hf_quant_config.json"
FP8 = Scheme(grid="fp8", bits=8, group_size=-1, strategy="tensor", activations="tensor")
NVFP4 = Scheme(grid="nvfp4", group_size=16)
ALGORITHMS = {FP8: "FP8", NVFP4: "W4A16_NVFP4"}
LOADERS = (
    ("vLLM", "from vllm import LLM\nllm = LLM(\"DIR\")\nprint(llm.generate(\"Hello\")[0].outputs[0].text)"),
    ("TensorRT-LLM", "from tensorrt_llm import LLM\nllm = LLM(model=\"DIR\")\n"
                     "print(llm.generate(\"Hello\").outputs[0].text)"),
)


def check(scheme: Scheme, linear_name: str, shape: tuple[int, int]) -> str | None:
    """Why a linear [N, K] cannot be held, with the nearest scheme that works; None when it can."""
    if scheme not in ALGORITHMS:
        return (f"{NAME} holds FP8 with one scale per matrix and calibrated inputs (--method fp8-static) or NVFP4 "
                f"(--method nvfp4), not the {scheme.label} of {linear_name}; nearest: --format compressed-tensors")
    if scheme == NVFP4 and shape[1] % 16:
        return (f"nvfp4 has groups of 16, which do not divide the {shape[1]} inputs of {linear_name}; nearest: group "
                f"size {nearest_group(16, shape[1])} of another grid, or a rule that skips it")
    return None


def check_together(schemes: Mapping[str, Scheme], others: Collection[str] = ()) -> str | None:
    """Why these linears cannot share a checkpoint: quant_algo is one for all."""
    by_scheme = {scheme: name for name, scheme in schemes.items()}
    if len(by_scheme) < 2:
        return None
    (one, first), (other, second) = list(by_scheme.items())[:2]
    return (f"{NAME} checkpoints have one quant_algo, but {first} is {one.label} and {second} is {other.label}; "
            "nearest: make them the same, or --format compressed-tensors")


def notes(schemes: Mapping[str, Scheme]) -> list[str]:
    return ["vLLM has no CPU kernels for this format, and transformers does not read it"]


def scale_dtype(model_dtype: torch.dtype) -> torch.dtype:
    """Scales are float32 whatever the dtype of the model."""
    return torch.float32


def layout(linear_name: str, shape: tuple[int, int], scheme: Scheme, model_dtype: torch.dtype) -> list[TensorSpec]:
    """Names, dtypes and shapes of the tensors of one linear [N, K]."""
    rows, columns = shape
    if scheme.grid == "fp8":
        return [TensorSpec(f"{linear_name}.weight", torch.float8_e4m3fn, (rows, columns)),
                TensorSpec(f"{linear_name}.weight_scale", torch.float32, ()),
                TensorSpec(f"{linear_name}.{INPUT_SCALE}", torch.float32, ())]
    return [TensorSpec(f"{linear_name}.weight", torch.uint8, (rows, columns // 2)),
            TensorSpec(f"{linear_name}.weight_scale", torch.float8_e4m3fn, (rows, columns // 16)),
            TensorSpec(f"{linear_name}.weight_scale_2", torch.float32, ())]


def pack(linear_name: str, tensor: QuantizedTensor, model_dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """The tensors that layout announced. Raises NumericalError for scales that cannot be kept exactly."""
    if not bool(torch.isfinite(tensor.scale).all()):
        raise NumericalError(f"{linear_name}: a scale is not finite; leave this linear unquantized with a rule")
    bits = to_bits(tensor)
    if tensor.grid == "fp8":
        return {f"{linear_name}.weight": bits.view(torch.float8_e4m3fn),
                f"{linear_name}.weight_scale": once(tensor.scale.float(), "tensor").reshape(()),
                f"{linear_name}.{INPUT_SCALE}": tensor.extra[INPUT_SCALE].float().reshape(())}
    grid = found.load("grids", "nvfp4")
    whole, local = grid.multiplier(tensor.extra["global_scale"]), grid.local_scales(tensor)
    if whole is None or not torch.equal(local.float() * whole, tensor.scale):
        raise NumericalError(f"{linear_name}: {_inexact(float(tensor.extra['global_scale']))}")
    return {f"{linear_name}.weight": bits[:, ::2] | bits[:, 1::2] << 4, f"{linear_name}.weight_scale": local,
            f"{linear_name}.weight_scale_2": whole.reshape(())}


def unpack(linear_name: str, read: Read, scheme: Scheme, shape: tuple[int, int],
           config: Mapping[str, Any] | None = None) -> QuantizedTensor:
    """The codes and scales of one linear [N, K]; CheckpointError for NVFP4 whose scales only multiply."""
    reason = obstacle(linear_name, read, scheme, shape)
    if reason:
        raise CheckpointError(f"{linear_name}: {reason}; read it as dense weights instead (qtool export --to hf)")
    return _read(linear_name, read, scheme, shape)


def obstacle(linear_name: str, read: Read, scheme: Scheme, shape: tuple[int, int],
             config: Mapping[str, Any] | None = None) -> str | None:
    """Why the scales cannot be kept as they are in another format, or None."""
    if scheme.grid == "fp8":
        return None
    whole = _one(read, f"{linear_name}.weight_scale_2")
    return None if found.load("grids", "nvfp4").divisor(whole) is not None else _inexact(float(whole))


def dequantize(linear_name: str, read: Read, scheme: Scheme, shape: tuple[int, int],
               config: Mapping[str, Any] | None = None) -> torch.Tensor:
    """float32 [N, K]."""
    decoded: torch.Tensor = found.load("grids", scheme.grid).decode(_read(linear_name, read, scheme, shape))
    return decoded


def config(schemes: Mapping[str, Scheme], skipped: Sequence[str], step_names: Sequence[str] = ()) -> dict[str, Any]:
    """The quantization_config. `skipped`: every other nn.Linear."""
    reason = check_together(schemes)
    if reason:
        raise PlanError(reason)
    scheme = next(iter(schemes.values()))
    weights: dict[str, Any] = {"dynamic": False, "num_bits": scheme.bits, "type": "float"}
    inputs = {"dynamic": False, "num_bits": 8, "type": "float"} if scheme == FP8 else None
    size = {"group_size": 16} if scheme == NVFP4 else {}
    return {"quant_method": "modelopt", "quant_algo": ALGORITHMS[scheme], **size,
            "ignore": list(dict.fromkeys([*skipped, "lm_head"])), "kv_cache_scheme": None,
            "producer": {"name": "qtool", "version": qtool.__version__},
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": {**weights, **size},
                                          "input_activations": inputs}}}


def kv_scales(attention: str) -> list[TensorSpec]:
    """The scales of the keys and values that an attention module caches: the largest magnitude over 448 of E4M3."""
    return [TensorSpec(f"{attention}.{name}", torch.float32, ()) for name in KV_SCALES]


def with_kv_cache(quantization_config: dict[str, Any]) -> dict[str, Any]:
    """The config that says so."""
    return {**quantization_config, "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"}}


def extra_files(quantization_config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """hf_quant_config.json, which TensorRT-LLM and older readers ask for: the same in other words."""
    said = quantization_config
    return {FILE: {"producer": said["producer"], "quantization": {
        "quant_algo": said["quant_algo"], "kv_cache_quant_algo": "FP8" if said["kv_cache_scheme"] else None,
        "group_size": said.get("group_size"), "exclude_modules": said["ignore"]}}}


def recognises(config: Mapping[str, Any]) -> bool:
    """Whether this config.json (or hf_quant_config.json) says ModelOpt, of any kind."""
    return str(quantization_config(config).get("quant_method")).startswith("modelopt")


def schemes(config: Mapping[str, Any], specs: Mapping[str, TensorSpec],
            read: Read | None = None) -> dict[str, tuple[Scheme, tuple[int, int]]]:
    """Scheme and [N, K] of every quantized linear, from the headers; raises CheckpointError."""
    said = quantization_config(config)
    nested = said.get("quantization")
    algorithm = (nested if isinstance(nested, Mapping) else said).get("quant_algo")
    found_schemes = {name: _scheme(name, algorithm, specs) for name in stored_linears(specs, "weight_scale")}
    if not found_schemes:
        raise CheckpointError("the checkpoint says ModelOpt, but no tensor is called *.weight_scale; fetch the model "
                              "again")
    return found_schemes


def _scheme(linear_name: str, algorithm: Any, specs: Mapping[str, TensorSpec]) -> tuple[Scheme, tuple[int, int]]:
    """The tensors tell FP8 and NVFP4 apart, also in checkpoints of MIXED_PRECISION."""
    weight, scale = specs.get(f"{linear_name}.weight"), specs[f"{linear_name}.weight_scale"]
    inputs = f"{linear_name}.{INPUT_SCALE}" in specs
    if weight is not None and len(weight.shape) == 2:
        rows, columns = weight.shape
        if weight.dtype is torch.float8_e4m3fn and scale.elements == 1:
            return FP8 if inputs else FP8.model_copy(update={"activations": None}), (rows, columns)
        if weight.dtype is torch.uint8 and scale.shape == (rows, columns // 8) and not inputs:
            return NVFP4, (rows, 2 * columns)
    raise CheckpointError(f"{linear_name}: of ModelOpt's checkpoints, FP8 with one scale per matrix and weight-only "
                          f"NVFP4 are read, not {algorithm} as it is here; start from the unquantized model")


def _read(linear_name: str, read: Read, scheme: Scheme, shape: tuple[int, int]) -> QuantizedTensor:
    rows, columns = shape
    where = f"{linear_name}.weight"
    stored = read(where)
    if scheme.grid == "fp8":
        bits = expect(where, stored, (torch.float8_e4m3fn,), shape).view(torch.uint8)
        scale = every_row(f"{where}_scale", _one(read, f"{where}_scale"), scheme, shape)
        fitted: QuantizedTensor = found.load("grids", "fp8").GRID.fitted(
            scale.contiguous(), columns, from_bits(linear_name, bits, "fp8"), "tensor")
        static = scheme.activations == "tensor"
        return replace(fitted, extra={INPUT_SCALE: _one(read, f"{linear_name}.{INPUT_SCALE}")} if static else {})
    packed = expect(where, stored, (torch.uint8,), (rows, columns // 2))
    bits = torch.stack((packed & 15, packed >> 4), -1).reshape(shape)
    local = expect(f"{where}_scale", read(f"{where}_scale"), (torch.float8_e4m3fn,), (rows, columns // 16))
    whole, grid = _one(read, f"{where}_scale_2"), found.load("grids", "nvfp4")
    divisor = grid.divisor(whole)
    tensor: QuantizedTensor = grid.GRID.fitted(local.float() * whole, 16, from_bits(linear_name, bits, "nvfp4"))
    return tensor if divisor is None else replace(tensor, extra={"global_scale": divisor})


def _one(read: Read, where: str) -> torch.Tensor:
    """A positive float32 [1]."""
    value = expect(where, read(where).reshape(-1), (torch.float32,), (1,))
    if not 0 < float(value) < float("inf"):
        raise CheckpointError(f"{where} is {float(value)}, not a positive number; the file is damaged")
    return value


def _inexact(value: float) -> str:
    return (f"its scale of the whole matrix, {value:.9g}, has no float32 inverse that gives every value again, so it "
            "cannot be kept exactly")
