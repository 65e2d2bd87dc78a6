"""AQLM's layout: additive codebooks, loaded by transformers with the package aqlm.

Per linear P of shape [N, K], with M codebooks of 2^B codewords of 8 columns:
    P.codes      int8 [N, K / 8, M] (int16 for more than 8 bits); a code of 2^(B-1) or more is stored less 2^B
    P.codebooks  [M, 2^B, 1, 8]   in the model's dtype
    P.scales     [N, 1, 1, 1]     in the model's dtype; 8 columns of a row are its scale times the sum of M codewords
A scalar codebook of 16 levels (grid lloyd4) is one of 256 pairs: codes int8 [N, K / 2, 1], codebooks [1, 256, 1, 2].
config.json names one M, B and width for all linears, and every other linear by its name.
Source: aqlm 1.1.7 inference.QuantizedLinear, utils; transformers 5.23 quantizers/quantizer_aqlm, AqlmConfig.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from qtool import found
from qtool.errors import CheckpointError, NumericalError, PlanError
from qtool.formats._defaults import extra_files as extra_files
from qtool.formats._defaults import fused_conflicts as fused_conflicts
from qtool.formats._stored import Read, expect, quantization_config, stored_linears
from qtool.grids import lloyd4
from qtool.grids.aqlm import MEMBERS
from qtool.recipe import Scheme
from qtool.tensors import FLOATING, QuantizedTensor, TensorSpec

NAME = "aqlm"
SUFFIXES = ("codebooks", "codes", "scales")
LOADERS = (
    ("transformers (with aqlm[cpu] or aqlm[gpu] installed)",
     "import os\n"
     "os.environ[\"NUMBA_NUM_THREADS\"] = \"1\"  # on a CPU: threads of aqlm 1.1.7 overwrite each other's sums\n"
     "import torch\n"
     "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
     "model = AutoModelForCausalLM.from_pretrained(\"DIR\", dtype=torch.float32)  # or float16 on a GPU\n"
     "tokenizer = AutoTokenizer.from_pretrained(\"DIR\")"),
)
LEVELS, NOT_LEVELS = "lloyd4", "its codewords are not all pairs of 16 levels, so its codes cannot be kept as they are"
LEVELS_SCHEME = Scheme(grid=LEVELS, bits=4, group_size=-1)
# grid -> codebooks, bits of a code, columns of a codeword
FORMS = {**{grid.name: (grid.books, grid.code_bits, 8) for grid in MEMBERS.values()}, LEVELS: (1, 8, 2)}


def check(scheme: Scheme, linear_name: str, shape: tuple[int, int]) -> str | None:
    """Why a linear [N, K] cannot be held, with the nearest scheme that works; None when it can."""
    if scheme.grid not in FORMS:
        return (f"{NAME} holds the codebooks of {', '.join(FORMS)}, not the {scheme.label} of {linear_name}; nearest: "
                "--method aqlm, or --format compressed-tensors")
    if scheme.grid == LEVELS and (scheme.group_size != -1 or scheme.activations):
        return (f"{NAME} has one scale for each row and rounds no inputs; take group_size -1 for the {LEVELS} grid of "
                f"{linear_name}, and leave activations out")
    width = FORMS[scheme.grid][2]
    if shape[1] % width:
        return (f"codewords have {width} columns, which do not divide the {shape[1]} inputs of {linear_name}; leave it "
                "out with a rule that skips it")
    return None


def check_together(schemes: Mapping[str, Scheme], others: Collection[str] = ()) -> str | None:
    """Why these linears cannot share a checkpoint: config.json has one number of codebooks and bits for all."""
    by_grid = {scheme.grid: name for name, scheme in schemes.items()}
    if len(by_grid) < 2:
        return None
    (one, first), (other, second) = list(by_grid.items())[:2]
    return (f"{NAME} checkpoints have codebooks of one kind, but {first} has {one} and {second} has {other}; make them "
            "the same")


def notes(schemes: Mapping[str, Scheme]) -> list[str]:
    """What to know about who can load it."""
    said = ["vLLM from 0.28 on has no aqlm; transformers loads this with the package aqlm, on a CPU in float32 and "
            "with NUMBA_NUM_THREADS=1 (threads of aqlm 1.1.7 overwrite each other's sums)"]
    if any(FORMS[scheme.grid][1] > 8 for scheme in schemes.values()):
        said.append("a codebook of 65,536 codewords takes 1 MiB in 16 bits for each linear, however small that is: for "
                    "small models see bits per weight, and aqlm-2x8")
    return said


def scale_dtype(model_dtype: torch.dtype) -> torch.dtype:
    """Of scales and codebooks."""
    return model_dtype


def layout(linear_name: str, shape: tuple[int, int], scheme: Scheme, model_dtype: torch.dtype) -> list[TensorSpec]:
    """Names, dtypes and shapes of the tensors of one linear [N, K]."""
    (books, bits, width), (rows, columns) = FORMS[scheme.grid], shape
    return [TensorSpec(f"{linear_name}.codebooks", model_dtype, (books, 1 << bits, 1, width)),
            TensorSpec(f"{linear_name}.codes", _code_dtype(bits), (rows, columns // width, books)),
            TensorSpec(f"{linear_name}.scales", model_dtype, (rows, 1, 1, 1))]


def pack(linear_name: str, tensor: QuantizedTensor, model_dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """The tensors that layout announced. Raises NumericalError for codewords or scales that are not finite."""
    words = 1 << FORMS[tensor.grid][1]
    codes, codebooks = _pairs(tensor) if tensor.grid == LEVELS else (tensor.codes, tensor.extra["codebooks"])
    if not bool(torch.isfinite(tensor.scale).all() and torch.isfinite(codebooks).all()):
        raise NumericalError(f"{linear_name}: a codeword or scale is not finite; leave this linear unquantized with a "
                             "rule")
    codes = torch.where(codes >= words // 2, codes - words, codes)
    return {f"{linear_name}.codebooks": codebooks[:, :, None].contiguous(),
            f"{linear_name}.codes": codes.to(_code_dtype(FORMS[tensor.grid][1])).contiguous(),
            f"{linear_name}.scales": tensor.scale[:, :, None, None].contiguous()}


def unpack(linear_name: str, read: Read, scheme: Scheme, shape: tuple[int, int],
           config: Mapping[str, Any] | None = None) -> QuantizedTensor:
    """Codes, codebooks and scales of one linear [N, K]. CheckpointError also for pairs that are not those of levels."""
    codes, codebooks, scale = _read(linear_name, read, scheme, shape)
    if scheme.grid != LEVELS:
        tensor: QuantizedTensor = found.load("grids", scheme.grid).fitted(codes, codebooks, scale)
        return tensor
    levels = _levels(codebooks)
    if levels is None:
        raise CheckpointError(f"{linear_name}: {NOT_LEVELS}; read it as dense weights instead (qtool export --to hf)")
    each = torch.stack((codes[..., 0] >> 4, codes[..., 0] & 15), -1).reshape(shape).to(torch.uint8)
    fitted: QuantizedTensor = lloyd4.GRID.fitted(scale, shape[1], each)
    return replace(fitted, extra={"levels": levels})


def obstacle(linear_name: str, read: Read, scheme: Scheme, shape: tuple[int, int],
             config: Mapping[str, Any] | None = None) -> str | None:
    """Why the codes cannot be kept as they are in another format, or None."""
    where = f"{linear_name}.codebooks"
    pairs = expect(where, read(where), FLOATING, (1, 256, 1, 2))[:, :, 0] if scheme.grid == LEVELS else None
    return NOT_LEVELS if pairs is not None and _levels(pairs) is None else None


def dequantize(linear_name: str, read: Read, scheme: Scheme, shape: tuple[int, int],
               config: Mapping[str, Any] | None = None) -> torch.Tensor:
    """float32 [N, K], whatever the codewords are."""
    codes, codebooks, scale = _read(linear_name, read, scheme, shape)
    if scheme.grid == LEVELS:
        return (codebooks.float()[0][codes[..., 0].long()] * scale.float()[..., None]).reshape(shape)
    decoded: torch.Tensor = found.load("grids", scheme.grid).decode(
        found.load("grids", scheme.grid).fitted(codes, codebooks, scale))
    return decoded


def config(schemes: Mapping[str, Scheme], skipped: Sequence[str], step_names: Sequence[str] = ()) -> dict[str, Any]:
    """The quantization_config. `skipped`: every other nn.Linear; by older versions looked for with .weight."""
    reason = check_together(schemes)
    if reason:
        raise PlanError(reason)
    books, bits, width = FORMS[next(iter(schemes.values())).grid]
    left = dict.fromkeys([*skipped, "lm_head"])
    return {"quant_method": "aqlm", "in_group_size": width, "out_group_size": 1, "num_codebooks": books,
            "nbits_per_codebook": bits,
            "linear_weights_not_to_quantize": [*left, *(f"{name}.weight" for name in left)]}


def recognises(config: Mapping[str, Any]) -> bool:
    return quantization_config(config).get("quant_method") == "aqlm"


def schemes(config: Mapping[str, Any], specs: Mapping[str, TensorSpec],
            read: Read | None = None) -> dict[str, tuple[Scheme, tuple[int, int]]]:
    """Scheme and [N, K] of every quantized linear, from config.json and the headers; raises CheckpointError."""
    said = quantization_config(config)
    form = tuple(said.get(key, default) for key, default in (
        ("num_codebooks", 1), ("nbits_per_codebook", 16), ("in_group_size", 8), ("out_group_size", 1)))
    grid = next((name for name, known in FORMS.items() if (*known, 1) == form), None)
    if grid is None or any(type(one) is not int for one in form):
        raise CheckpointError(f"AQLM with {form[0]!r} codebooks of {form[1]!r} bits in groups of {form[2]!r} x "
                              f"{form[3]!r} is not read (read: {', '.join(MEMBERS)} in groups of 8 x 1, pairs of 8 "
                              "bits); start from the unquantized model")
    books, _, width = FORMS[grid]
    scheme = LEVELS_SCHEME if grid == LEVELS else Scheme(grid=grid, bits=MEMBERS[grid].bits, group_size=width)
    found_schemes = {}
    for name in stored_linears(specs, "codes"):
        shape = specs[f"{name}.codes"].shape
        if len(shape) != 3 or shape[2] != books:
            raise CheckpointError(f"{name}.codes is {list(shape)}, not [outputs, inputs / {width}, {books}]; the "
                                  "tensor does not fit the quantization_config in config.json")
        found_schemes[name] = scheme, (shape[0], shape[1] * width)
    if not found_schemes:
        raise CheckpointError("config.json says AQLM, but no tensor is called *.codes; fetch the model again")
    return found_schemes


def _read(linear_name: str, read: Read, scheme: Scheme,
          shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes int32 [N, K / width, M] from 0 on, codebooks [M, codewords, width], scales [N, 1]."""
    (books, bits, width), (rows, columns) = FORMS[scheme.grid], shape
    where = tuple(f"{linear_name}.{suffix}" for suffix in SUFFIXES)
    codebooks = expect(where[0], read(where[0]), FLOATING, (books, 1 << bits, 1, width))
    codes = expect(where[1], read(where[1]), (_code_dtype(bits),), (rows, columns // width, books))
    scale = expect(where[2], read(where[2]), FLOATING, (rows, 1, 1, 1))
    return codes.to(torch.int32) & ((1 << bits) - 1), codebooks[:, :, 0], scale[:, :, 0, 0]


def _pairs(tensor: QuantizedTensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of pairs of columns int32 [N, K / 2, 1], and these pairs [1, 256, 2]."""
    levels, codes = tensor.extra["levels"], tensor.codes.to(torch.int32)
    both = torch.stack((levels.repeat_interleave(16), levels.repeat(16)), -1)
    return (codes[:, ::2] << 4 | codes[:, 1::2])[..., None], both[None]


def _levels(codebooks: torch.Tensor) -> torch.Tensor | None:
    """The 16 levels whose pairs these are [1, 256, 2], ascending, or None."""
    levels = codebooks[0, :16, 1].clone()
    wanted = torch.stack((levels.repeat_interleave(16), levels.repeat(16)), -1)
    ascending = bool((levels.float().diff() >= 0).all())
    return levels if ascending and torch.equal(wanted, codebooks[0]) else None


def _code_dtype(bits: int) -> torch.dtype:
    return torch.int8 if bits <= 8 else torch.int16
