"""Plain dense weights under their own names: what `qtool export --to hf` writes, and every program reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from qtool.errors import CheckpointError
from qtool.formats._defaults import check_together as check_together
from qtool.formats._defaults import extra_files as extra_files
from qtool.formats._defaults import fused_conflicts as fused_conflicts
from qtool.formats._defaults import notes as notes
from qtool.formats._defaults import recognises as recognises
from qtool.formats._defaults import schemes as schemes
from qtool.formats._stored import Read, Stored, packable
from qtool.recipe import Scheme
from qtool.tensors import QuantizedTensor, TensorSpec

NAME = "hf"
SUFFIXES = ("weight",)
LOADERS = (
    ("transformers", "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
                     "model = AutoModelForCausalLM.from_pretrained(\"DIR\", dtype=\"auto\")\n"
                     "tokenizer = AutoTokenizer.from_pretrained(\"DIR\")"),
    ("vLLM", "from vllm import LLM\nllm = LLM(\"DIR\")\nprint(llm.generate(\"Hello\")[0].outputs[0].text)"),
)


def check(scheme: Scheme, linear_name: str, shape: tuple[int, int]) -> str | None:
    """Always a reason: dense weights keep no codes."""
    return (f"hf keeps dense weights, not the {scheme.label} codes of {linear_name}; nearest: --format "
            "compressed-tensors, and qtool export --to hf afterwards for the dense copy")


def scale_dtype(model_dtype: torch.dtype) -> torch.dtype:
    return model_dtype


def layout(linear_name: str, shape: tuple[int, int], scheme: Scheme, model_dtype: torch.dtype) -> list[TensorSpec]:
    """One tensor, [N, K] in the dtype of the model."""
    return [TensorSpec(f"{linear_name}.weight", model_dtype, tuple(shape))]


def pack(linear_name: str, tensor: QuantizedTensor, model_dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """The weight that the codes stand for, in the dtype of the scales (scale_dtype says that of the model)."""
    scale = packable(linear_name, tensor, tensor.scale.dtype)
    dense = Stored(tensor.codes.contiguous(), scale, tensor.zero_point).dequantize()
    return {f"{linear_name}.weight": dense.to(scale.dtype)}


def unpack(linear_name: str, read: Read, scheme: Scheme, shape: tuple[int, int],
           config: Mapping[str, Any] | None = None) -> QuantizedTensor:
    raise CheckpointError(f"{linear_name} is stored as dense weights; there are no codes to read")


def dequantize(linear_name: str, read: Read, scheme: Scheme, shape: tuple[int, int],
               config: Mapping[str, Any] | None = None) -> torch.Tensor:
    """float32 [N, K]."""
    return read(f"{linear_name}.weight").float()


def config(schemes: Mapping[str, Scheme], skipped: Sequence[str], step_names: Sequence[str] = ()) -> dict[str, Any]:
    """Nothing: no quantization_config is written."""
    return {}
