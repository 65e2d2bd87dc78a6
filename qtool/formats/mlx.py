"""MLX's "affine" mode: 2, 3, 4, 5, 6 or 8 bits in groups of 32, 64 or 128. mlx-lm, on Apple's chips and on CPUs.

Per linear P of shape [N, K] in groups of g columns:
    P.weight  uint32 [N, K bits / 32]   codes of a row as one little-endian bit stream
    P.scales  model dtype or float32 [N, K / g];  P.biases likewise
W[n, k] = scale * code + bias, which is a zero point where bias = -zero * scale. In a symmetric grid the zero point is a
power of two and the bias is exact in the dtype of the scale. Otherwise it has more digits, so that both are float32
then, which mlx takes beside inputs of any type. Scales have at most 16 significant bits (those of bfloat16 and float16
do): scale * code and every sum with the bias are then exact in float32, and equal to (code - zero) * scale.
The linears of all experts of a kind lie in one tensor, [experts, N, ...], as mlx-lm runs them:
    P.switch_mlp.gate_proj.weight   of P.experts.0.gate_proj, P.experts.1.gate_proj ...; likewise up_proj, down_proj
Checkpoints of other programs may hold any bias; such weights are read, but have no codes that other formats could keep.
Source: mlx 0.32 ops.cpp (dequantize), mlx-lm 0.32 utils.load_model.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from qtool import ops
from qtool.errors import CheckpointError, NumericalError
from qtool.formats._defaults import extra_files as extra_files
from qtool.formats._defaults import fused_conflicts as fused_conflicts
from qtool.formats._stored import Read, expect, nearest_group, packable, quantization_config, scheme_of, stored_linears
from qtool.ops import int4 as layouts
from qtool.recipe import Scheme
from qtool.tensors import FLOATING, QuantizedTensor, TensorSpec

NAME = "mlx"
SUFFIXES = ("weight", "scales", "biases")
CONFIG_KEYS = ("quantization", "quantization_config")
METADATA = {"format": "mlx"}
WIDER = {"affine": (torch.bfloat16, torch.float16)}
BITS, GROUP_SIZES = (2, 3, 4, 5, 6, 8), (32, 64, 128)
MIXTRAL = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}  # what mlx-lm calls them
EXPERT = re.compile(r"(.+\.mlp)\.experts\.(\d{1,6})\.(gate_proj|up_proj|down_proj)"
                    r"|(.+\.block_sparse_moe)\.experts\.(\d{1,6})\.(w[123])")  # block, number, kind
SWITCH = re.compile(r"(.+\.(?:mlp|block_sparse_moe))\.switch_mlp\.(gate_proj|up_proj|down_proj)\."
                    r"(weight|scales|biases)")
OTHERWISE = ("afmoe", "dots1", "Klear")  # model types whose experts mlx-lm does not call switch_mlp
MAX_EXPERTS = 4096
SPARE_BITS = 0xFF  # of a float32 mantissa, beside 16 significant ones
LOADERS = (
    ("mlx-lm", "from mlx_lm import load, generate\nmodel, tokenizer = load(\"DIR\")\n"
               "print(generate(model, tokenizer, prompt=\"Hello\"))"),
)


def check(scheme: Scheme, linear_name: str, shape: tuple[int, int]) -> str | None:
    """Why a linear [N, K] cannot be held, with the nearest that works; None when it can."""
    if scheme.grid != "affine" or scheme.activations:
        return (f"{NAME} holds weight-only integers, not the {scheme.label} of {linear_name}; nearest: grid affine, "
                f"{scheme.bits} bits, no activations")
    if ".experts." in linear_name and _switch(linear_name) is None:
        return (f"{linear_name}: of experts {NAME} is written for mlp.experts with gate_proj, up_proj, down_proj and "
                "block_sparse_moe.experts with w1, w2 and w3; nearest: a rule that skips experts, or another --format")
    if scheme.bits not in BITS:
        return f"{NAME} packs 2, 3, 4, 5, 6 or 8 bits, not the {scheme.bits} of {linear_name}; nearest: 6 or 8"
    group, columns = int(scheme.group_size), shape[1]
    if group in GROUP_SIZES and columns % group == 0:
        return None
    fits = [size for size in GROUP_SIZES if columns % size == 0]
    near = nearest_group(group if group > 0 else columns, columns)
    nearest = min(fits, key=lambda size: abs(size - near), default=None)
    hint = f"nearest: --group-size {nearest}" if nearest else "none of these divides its inputs; skip it with a rule"
    return f"{NAME} has groups of 32, 64 or 128, not the {group} of {linear_name} with {columns} inputs; {hint}"


def check_together(schemes: Mapping[str, Scheme], others: Collection[str] = ()) -> str | None:
    """Why these linears cannot share a checkpoint: mlx-lm runs all experts of a kind as one linear."""
    found: dict[str, tuple[str, Scheme | None]] = {}
    for name, scheme in [*schemes.items(), *((one, None) for one in others)]:
        switch = _switch(name)
        first, before = found.setdefault(switch[0], (name, scheme)) if switch else (name, scheme)
        if scheme != before:
            labels = [one.label if one else "unquantized" for one in (before, scheme)]
            return (f"{NAME} holds this linear of all experts as one tensor, and {first} is {labels[0]}, but {name} "
                    f"{labels[1]}; use a rule that matches all of them (experts.*)")
    return None


def check_model(model_type: str, linears: Iterable[str]) -> str | None:
    """Why a model whose linears `linears` are quantized cannot be held: mlx-lm calls its experts otherwise."""
    expert = next((name for name in linears if ".experts." in name), None)
    if model_type not in OTHERWISE or expert is None:
        return None
    return (f"{NAME}: mlx-lm has other names for the experts of {model_type} than {NAME} is written with "
            f"({expert}); nearest: a rule that skips experts, or another --format")


def notes(schemes: Mapping[str, Scheme]) -> list[str]:
    """What to know about who can load it."""
    if all(scheme.symmetric for scheme in schemes.values()):
        return []
    return ["with zero points, scales and biases are float32 (exact), and mlx computes in float32 from there on; "
            "--symmetric keeps them in the model's dtype"]


def scale_dtype(model_dtype: torch.dtype) -> torch.dtype:
    """The values that scales may have: those of the model's dtype, of a float32 model bfloat16's."""
    return model_dtype if model_dtype.itemsize == 2 else torch.bfloat16


def layout(linear_name: str, shape: tuple[int, int], scheme: Scheme, model_dtype: torch.dtype) -> list[TensorSpec]:
    """Names, dtypes and shapes of the tensors of one linear [N, K]; a bias stays under its own name, P.bias."""
    rows, columns = shape
    dtype, groups = _stored_dtype(scheme.symmetric, model_dtype), columns // int(scheme.group_size)
    return [stacked(one) for one in (
        TensorSpec(f"{linear_name}.weight", torch.uint32, (rows, columns * scheme.bits // 32)),
        TensorSpec(f"{linear_name}.scales", dtype, (rows, groups)),
        TensorSpec(f"{linear_name}.biases", dtype, (rows, groups)))]


def stacked(spec: TensorSpec) -> TensorSpec:
    """The tensor of an expert as a part of the one for all of its kind; others as they are."""
    linear, _, what = spec.name.rpartition(".")
    switch = _switch(linear) if what in SUFFIXES else None
    return replace(spec, stack=(f"{switch[0]}.{what}", switch[1])) if switch else spec


def members(spec: TensorSpec) -> list[str]:
    """The names of the experts' tensors that lie in a tensor [experts, N, ...]; none if it is no such one."""
    found = SWITCH.fullmatch(spec.name)
    if found is None or len(spec.shape) != 3 or spec.shape[0] > MAX_EXPERTS:
        return []
    block, kind, part = found.groups()
    ours = {theirs: name for name, theirs in MIXTRAL.items()}[kind] if block.endswith("block_sparse_moe") else kind
    return [f"{block}.experts.{number}.{ours}.{part}" for number in range(spec.shape[0])]


def pack(linear_name: str, tensor: QuantizedTensor, model_dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """The tensors that layout announced. Raises NumericalError for a scale that cannot be kept exactly."""
    dtype = _stored_dtype(tensor.symmetric, model_dtype or tensor.scale.dtype)
    scale = packable(linear_name, tensor, dtype)
    biases = -tensor.zero_point.double() * scale.double()
    stored = biases.to(dtype)
    if not bool((stored.double() == biases).all()) or not bool(_short(scale).all()):
        raise NumericalError(f"{linear_name}: a scale has more digits than {NAME} can multiply exactly, or a bias lies "
                             "outside the range of its type; leave this linear unquantized with a rule that skips it")
    return {f"{linear_name}.weight": ops.pack_bits(tensor.codes, tensor.bits).view(torch.uint32),
            f"{linear_name}.scales": scale, f"{linear_name}.biases": stored}


def unpack(linear_name: str, read: Read, scheme: Scheme, shape: tuple[int, int],
           config: Mapping[str, Any] | None = None) -> QuantizedTensor:
    """The codes and scales of one linear [N, K]; CheckpointError when its biases are no zero points."""
    scale, biases = _scales(linear_name, read, scheme, shape)
    zero_point = _zero_point(scale, biases, scheme.bits)
    if zero_point is None:
        raise CheckpointError(f"{linear_name}: {_no_zero_points()}")
    symmetric = scheme.symmetric and bool((zero_point == 1 << (scheme.bits - 1)).all())
    return QuantizedTensor(_codes(linear_name, read, scheme, shape), scale, zero_point, scheme.bits,
                           int(scheme.group_size), symmetric)


def obstacle(linear_name: str, read: Read, scheme: Scheme, shape: tuple[int, int],
             config: Mapping[str, Any] | None = None) -> str | None:
    """Why the codes of a linear cannot be kept as they are in another format, from its small tensors; or None."""
    return _no_zero_points() if _zero_point(*_scales(linear_name, read, scheme, shape), scheme.bits) is None else None


def dequantize(linear_name: str, read: Read, scheme: Scheme, shape: tuple[int, int],
               config: Mapping[str, Any] | None = None) -> torch.Tensor:
    """float32 [N, K], whatever the biases: products and sums in float32, as mlx takes them with float32 inputs."""
    scale, biases = (one.float().unsqueeze(-1) for one in _scales(linear_name, read, scheme, shape))
    codes = _codes(linear_name, read, scheme, shape).view(shape[0], scale.shape[1], -1)
    return (codes.float() * scale + biases).view(shape)


def int4(linear_name: str, config: Mapping[str, Any] | None = None) -> tuple[str, int]:
    """The tensor with the codes of a linear of 4 bits, and its layout."""
    return f"{linear_name}.weight", layouts.ALONG_ROWS


def config(schemes: Mapping[str, Scheme], skipped: Sequence[str], step_names: Sequence[str] = ()) -> dict[str, Any]:
    """The quantization_config: the commonest scheme for all; other linears by name, unquantized modules as false."""
    base = Counter((scheme.bits, scheme.group_size) for scheme in schemes.values()).most_common(1)[0][0]
    others = {_path(name): _described(scheme) for name, scheme in schemes.items()
              if (scheme.bits, scheme.group_size) != base}
    blocks, found, _ = next(iter(schemes)).partition(".layers.")
    left = [*([f"{blocks}.embed_tokens"] if found else []), *map(_path, skipped)]
    alike = {scheme.symmetric for scheme in schemes.values()}
    return {"group_size": base[1], "bits": base[0], "mode": "affine",
            **({"symmetric": alike.pop()} if len(alike) == 1 else {}), **others, **dict.fromkeys(left, False)}


def adapted(config: Mapping[str, Any]) -> dict[str, Any]:
    """rope_parameters and the number of experts, as transformers 5 writes them, also under the older names: most of
    mlx-lm knows only those."""
    config = {**({"num_experts": config["num_local_experts"]} if "num_local_experts" in config else {}), **config}
    rope = config.get("rope_parameters")
    if not isinstance(rope, Mapping) or "rope_theta" not in rope or "rope_theta" in config:
        return dict(config)
    scaling = {} if rope.get("rope_type", "default") == "default" else {"rope_scaling": dict(rope)}
    return {**config, "rope_theta": rope["rope_theta"], **scaling}


def recognises(config: Mapping[str, Any]) -> bool:
    """Whether this config.json says MLX: a group size and bits, and no quant_method."""
    said = quantization_config(config)
    return "quant_method" not in said and "group_size" in said and "bits" in said


def schemes(config: Mapping[str, Any], specs: Mapping[str, TensorSpec],
            read: Read | None = None) -> dict[str, tuple[Scheme, tuple[int, int]]]:
    """Scheme and [N, K] of every quantized linear and embedding, from config.json and the headers.

    Raises CheckpointError.
    """
    said = quantization_config(config)
    found = {name: _scheme(name, said, specs) for name in stored_linears(specs, "scales")}
    if not found:
        raise CheckpointError("config.json says MLX, but no tensor is called *.scales; fetch the model again")
    return found


def _scheme(linear_name: str, said: Mapping[str, Any],
            specs: Mapping[str, TensorSpec]) -> tuple[Scheme, tuple[int, int]]:
    named = said.get(_path(linear_name))
    values = {**said, **(named if isinstance(named, Mapping) else {})}
    mode = values.get("mode", "affine")
    if mode != "affine" or f"{linear_name}.biases" not in specs:
        raise CheckpointError(f"{linear_name}: of MLX's modes only affine is read, not {mode!r} without biases; start "
                              "from the unquantized model")
    bits, size = values.get("bits"), values.get("group_size")
    scheme = scheme_of(linear_name, bits, size, said.get("symmetric") is True)
    words, scales = specs.get(f"{linear_name}.weight"), specs[f"{linear_name}.scales"]
    columns = words.shape[-1] * 32 // scheme.bits if words is not None and words.shape else 0
    if scheme.bits not in BITS or scheme.group_size not in GROUP_SIZES:
        raise CheckpointError(f"{linear_name}: {bits} bits in groups of {size} are no mode of MLX that is read")
    if words is None or len(words.shape) != 2 or scales.shape != (words.shape[0], columns // int(scheme.group_size)):
        raise CheckpointError(f"{linear_name}: weight {list(words.shape) if words else 'is missing'} and scales "
                              f"{list(scales.shape)} are no matrix of {bits} bits in groups of {size}, and no "
                              "experts in one tensor under a name that is known (mlp.switch_mlp.gate_proj)")
    return scheme, (words.shape[0], columns)


def _switch(linear_name: str) -> tuple[str, int] | None:
    """What mlx-lm calls the experts of a kind, and which one this is; None for what is no expert."""
    found = EXPERT.fullmatch(linear_name)
    if found is None:
        return None
    block, number, kind = (one for one in found.groups() if one is not None)
    return f"{block}.switch_mlp.{MIXTRAL.get(kind, kind)}", int(number)


def _path(linear_name: str) -> str:
    """What mlx-lm calls the module with this linear."""
    switch = _switch(linear_name)
    return switch[0] if switch else linear_name


def _stored_dtype(symmetric: bool, model_dtype: torch.dtype) -> torch.dtype:
    return model_dtype if symmetric else torch.float32


def _described(scheme: Scheme) -> dict[str, Any]:
    return {"group_size": scheme.group_size, "bits": scheme.bits, "mode": "affine"}


def _no_zero_points() -> str:
    return "its biases are no multiples of its scales, so its codes cannot be kept as they are"


def _short(scale: torch.Tensor) -> torch.Tensor:
    """Which scales have at most 16 significant bits."""
    return scale.float().view(torch.int32) & SPARE_BITS == 0


def _scales(linear_name: str, read: Read, scheme: Scheme, shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    wanted = shape[0], shape[1] // int(scheme.group_size)
    scale, biases = (expect(where, read(where), FLOATING, wanted)
                     for where in (f"{linear_name}.scales", f"{linear_name}.biases"))
    return scale, biases


def _codes(linear_name: str, read: Read, scheme: Scheme, shape: tuple[int, int]) -> torch.Tensor:
    where = f"{linear_name}.weight"
    words = expect(where, read(where), (torch.uint32,), (shape[0], shape[1] * scheme.bits // 32))
    return ops.unpack_bits(words.view(torch.int32), scheme.bits, shape[1])


def _zero_point(scale: torch.Tensor, biases: torch.Tensor, bits: int) -> torch.Tensor | None:
    """uint8 [N, G] with bias = -zero * scale exactly, where there is one for every group; else None."""
    scale, biases = scale.double(), biases.double()
    middle = float(1 << (bits - 1))
    zero = torch.where(scale == 0, middle, (-biases / scale).round())
    exact = (zero * scale == -biases) & (zero >= 0) & (zero < 1 << bits) & _short(scale)
    return zero.to(torch.uint8) if bool(exact.all()) else None
