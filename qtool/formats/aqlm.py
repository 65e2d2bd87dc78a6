"""AQLM's layout: additive codebooks, loaded by transformers with the package aqlm.

Per linear P of shape [N, K], with M codebooks of 2^B codewords:
    P.codes      int8 [N, K / 8, M] (int16 for more than 8 bits); a code of 2^(B-1) or more is stored less 2^B
    P.codebooks  [M, 2^B, 1, 8]   in the model's dtype
    P.scales     [N, 1, 1, 1]     in the model's dtype; 8 columns of a row are its scale times the sum of M codewords
config.json names one M and B for all linears, and every other linear by its name.
Source: aqlm 1.1.7 inference.QuantizedLinear, utils; transformers 5.23 quantizers/quantizer_aqlm, AqlmConfig.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from qtool import found
from qtool.errors import CheckpointError, NumericalError, PlanError
from qtool.formats._defaults import extra_files as extra_files
from qtool.formats._defaults import fused_conflicts as fused_conflicts
from qtool.formats._stored import Read, expect, quantization_config, stored_linears
from qtool.grids.aqlm import MEMBERS
from qtool.recipe import Scheme
from qtool.tensors import FLOATING, QuantizedTensor, TensorSpec

NAME = "aqlm"
SUFFIXES = ("codebooks", "codes", "scales")
GROUP = 8  # columns of a codeword
LOADERS = (
    ("transformers (with aqlm[cpu] or aqlm[gpu] installed)",
     "import os\n"
     "os.environ[\"NUMBA_NUM_THREADS\"] = \"1\"  # on a CPU: threads of aqlm 1.1.7 overwrite each other's sums\n"
     "import torch\n"
     "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
     "model = AutoModelForCausalLM.from_pretrained(\"DIR\", dtype=torch.float32)  # or float16 on a GPU\n"
     "tokenizer = AutoTokenizer.from_pretrained(\"DIR\")"),
)
GRIDS = {(grid.books, grid.code_bits): grid for grid in MEMBERS.values()}


def check(scheme: Scheme, linear_name: str, shape: tuple[int, int]) -> str | None:
    """Why a linear [N, K] cannot be held, with the nearest scheme that works; None when it can."""
    if scheme.grid not in MEMBERS:
        return (f"{NAME} holds the codebooks of {', '.join(MEMBERS)}, not the {scheme.label} of {linear_name}; nearest: "
                "--method aqlm, or --format compressed-tensors")
    if shape[1] % GROUP:
        return (f"codewords have {GROUP} columns, which do not divide the {shape[1]} inputs of {linear_name}; leave it "
                "out with a rule that skips it")
    return None


def check_together(schemes: Mapping[str, Scheme]) -> str | None:
    """Why these linears cannot share a checkpoint: config.json has one number of codebooks and bits for all."""
    by_grid = {scheme.grid: name for name, scheme in schemes.items()}
    if len(by_grid) < 2:
        return None
    (one, first), (other, second) = list(by_grid.items())[:2]
    return (f"{NAME} checkpoints have codebooks of one kind, but {first} has {one} and {second} has {other}; make them "
            "the same")


def notes(schemes: Mapping[str, Scheme]) -> list[str]:
    """What to know about who can load it."""
    said = ["vLLM from 0.28 on has no aqlm; transformers loads this with the package aqlm, on a CPU in float32 and with "
            "NUMBA_NUM_THREADS=1 (threads of aqlm 1.1.7 overwrite each other's sums)"]
    if any(MEMBERS[scheme.grid].words > 1 << 8 for scheme in schemes.values()):
        said.append("a codebook of 65,536 codewords takes 1 MiB in 16 bits for each linear, however small that is: for "
                    "small models see bits per weight, and aqlm-2x8")
    return said


def scale_dtype(model_dtype: torch.dtype) -> torch.dtype:
    """Of scales and codebooks."""
    return model_dtype


def layout(linear_name: str, shape: tuple[int, int], scheme: Scheme, model_dtype: torch.dtype) -> list[TensorSpec]:
    """Names, dtypes and shapes of the tensors of one linear [N, K]."""
    grid, (rows, columns) = MEMBERS[scheme.grid], shape
    return [TensorSpec(f"{linear_name}.codebooks", model_dtype, (grid.books, grid.words, 1, GROUP)),
            TensorSpec(f"{linear_name}.codes", _code_dtype(grid.code_bits), (rows, columns // GROUP, grid.books)),
            TensorSpec(f"{linear_name}.scales", model_dtype, (rows, 1, 1, 1))]


def pack(linear_name: str, tensor: QuantizedTensor, model_dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """The tensors that layout announced. Raises NumericalError for codewords or scales that are not finite."""
    grid, codebooks = MEMBERS[tensor.grid], tensor.extra["codebooks"]
    if not bool(torch.isfinite(tensor.scale).all() and torch.isfinite(codebooks).all()):
        raise NumericalError(f"{linear_name}: a codeword or scale is not finite; leave this linear unquantized with a "
                             "rule")
    codes = torch.where(tensor.codes >= grid.words // 2, tensor.codes - grid.words, tensor.codes)
    return {f"{linear_name}.codebooks": codebooks[:, :, None].contiguous(),
            f"{linear_name}.codes": codes.to(_code_dtype(grid.code_bits)).contiguous(),
            f"{linear_name}.scales": tensor.scale[:, :, None, None].contiguous()}


def unpack(linear_name: str, read: Read, scheme: Scheme, shape: tuple[int, int],
           config: Mapping[str, Any] | None = None) -> QuantizedTensor:
    """Codes, codebooks and scales of one linear [N, K]. Raises CheckpointError."""
    grid, (rows, columns) = MEMBERS[scheme.grid], shape
    where = tuple(f"{linear_name}.{suffix}" for suffix in SUFFIXES)
    codebooks = expect(where[0], read(where[0]), FLOATING, (grid.books, grid.words, 1, GROUP))
    codes = expect(where[1], read(where[1]), (_code_dtype(grid.code_bits),), (rows, columns // GROUP, grid.books))
    scale = expect(where[2], read(where[2]), FLOATING, (rows, 1, 1, 1))
    tensor: QuantizedTensor = grid.fitted(codes.to(torch.int32) & (grid.words - 1), codebooks[:, :, 0], scale[:, :, 0, 0])
    return tensor


def dequantize(linear_name: str, read: Read, scheme: Scheme, shape: tuple[int, int],
               config: Mapping[str, Any] | None = None) -> torch.Tensor:
    """float32 [N, K]."""
    decoded: torch.Tensor = found.load("grids", scheme.grid).decode(unpack(linear_name, read, scheme, shape))
    return decoded


def config(schemes: Mapping[str, Scheme], skipped: Sequence[str], step_names: Sequence[str] = ()) -> dict[str, Any]:
    """The quantization_config. `skipped`: every other nn.Linear; by older versions looked for with .weight."""
    reason = check_together(schemes)
    if reason:
        raise PlanError(reason)
    grid, left = MEMBERS[next(iter(schemes.values())).grid], dict.fromkeys([*skipped, "lm_head"])
    return {"quant_method": "aqlm", "in_group_size": GROUP, "out_group_size": 1, "num_codebooks": grid.books,
            "nbits_per_codebook": grid.code_bits,
            "linear_weights_not_to_quantize": [*left, *(f"{name}.weight" for name in left)]}


def recognises(config: Mapping[str, Any]) -> bool:
    return quantization_config(config).get("quant_method") == "aqlm"


def schemes(config: Mapping[str, Any], specs: Mapping[str, TensorSpec],
            read: Read | None = None) -> dict[str, tuple[Scheme, tuple[int, int]]]:
    """Scheme and [N, K] of every quantized linear, from config.json and the headers; raises CheckpointError."""
    said = quantization_config(config)
    sizes = [said.get(key, default) for key, default in (
        ("num_codebooks", 1), ("nbits_per_codebook", 16), ("in_group_size", 8), ("out_group_size", 1))]
    grid = GRIDS.get((sizes[0], sizes[1])) if sizes[2:] == [GROUP, 1] and all(type(one) is int for one in sizes) else None
    if grid is None:
        raise CheckpointError(f"AQLM with {sizes[0]!r} codebooks of {sizes[1]!r} bits in groups of {sizes[2]!r} x "
                              f"{sizes[3]!r} is not read (read: {', '.join(MEMBERS)}, groups of {GROUP} x 1); start from "
                              "the unquantized model")
    scheme, found_schemes = Scheme(grid=grid.name, bits=grid.bits, group_size=GROUP), {}
    for name in stored_linears(specs, "codes"):
        shape = specs[f"{name}.codes"].shape
        if len(shape) != 3 or shape[2] != grid.books:
            raise CheckpointError(f"{name}.codes is {list(shape)}, not [outputs, inputs / {GROUP}, {grid.books}]; the "
                                  "tensor does not fit the quantization_config in config.json")
        found_schemes[name] = scheme, (shape[0], shape[1] * GROUP)
    if not found_schemes:
        raise CheckpointError("config.json says AQLM, but no tensor is called *.codes; fetch the model again")
    return found_schemes


def _code_dtype(bits: int) -> torch.dtype:
    return torch.int8 if bits <= 8 else torch.int16
