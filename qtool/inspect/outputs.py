"""What quantization does to the output of each linear, measured from the files: W x beside Q x.

A few windows of the built-in text run through the unquantized model block by block; memory is one block. Each linear
sees the inputs that it has there, so its error is its own, whatever came of the linears before it. What a manifest says
plays no part, so anyone's checkpoint can be measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from qtool import quality
from qtool.activations import mixed_product, round_inputs
from qtool.decode import Source
from qtool.errors import InputError
from qtool.grids import vectorwise_int8
from qtool.inspect.files import Step, no_steps
from qtool.models import blocks, calibration, skeleton, statistics
from qtool.models.skeleton import Skeleton
from qtool.models.streams import StreamStore
from qtool.recipe import Calibration, Scheme
from qtool.tensors import INPUT_SCALE, QuantizedTensor

TEXT = "builtin:evaluation"  # the half that never calibrates
WINDOW = 256  # tokens; a shorter model has shorter windows
Rows = Mapping[str, dict[str, Any]]


@torch.inference_mode()
def add(source: Source, base: Source, rows: list[dict[str, Any]], tokens: int, step: Step = no_steps) -> dict[str, Any]:
    """output_error Σ|W x - Q x|² / Σ|W x|² and output_sqnr_db into the row of every quantized linear of the blocks.

    x: its inputs in `base` on `tokens` tokens; Q x also has the rounding of inputs, where the scheme asks for it. None
    for experts that no token reached, and for rescaled weights, whose inputs are others. Returns what was run. Raises
    InputError, CalibrationError, ModelError.
    """
    bones = skeleton.build(base.directory, base.config, base.specs)
    window = min(WINDOW, base.config.get("max_position_embeddings") or WINDOW)
    if tokens < 8:
        raise InputError(f"--tokens {tokens}: at least 8 are needed, or 0 to leave the outputs out")
    window, count = min(window, tokens), max(1, tokens // min(window, tokens))
    spec = Calibration(source=TEXT, sequence_length=window)
    text = calibration.load_tokens(spec, base.directory, count, bones.vocabulary)
    device, wanted = torch.device("cpu"), {row["stored"]: row for row in rows if not row.get("rescaled")}
    dtype = blocks.choose_compute_dtype(device, base.dtype)
    store = StreamStore(count, window, bones.hidden, torch.float32, 1 << 62)
    everything = slice(0, count)
    arguments = blocks.capture(bones, base.read, text.ids, store, device, dtype, [everything])
    for index, prefix in enumerate(bones.blocks):
        step(index, len(bones.blocks), prefix)
        block = blocks.load_block(bones, index, base.read, device, dtype)
        _watch(bones, block, index, source, wanted)
        store.write(everything, statistics.run_block(block, arguments, index, store, everything, device, dtype))
    return {"text": TEXT, "tokens": count * window, "windows": count, "sha256": text.sha256}


def _watch(bones: Skeleton, block: nn.Module, index: int, source: Source, wanted: Rows) -> None:
    """Let every linear of the block that is wanted measure its error when it is called."""
    prefix = bones.blocks[index] + "."
    for name in bones.block_linears(index):
        stored = bones.stored(name)
        if stored in wanted:
            block.get_submodule(name.removeprefix(prefix)).register_forward_pre_hook(_hook(source, wanted[stored]))


def _hook(source: Source, row: dict[str, Any]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def measure(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        x = inputs[0].reshape(-1, inputs[0].shape[-1])
        if len(x):
            weight = module.get_parameter("weight").float()
            error = _error(x.float(), weight, source, row["stored"])
            row["output_error"] = float(f"{error:.6g}")
            row["output_sqnr_db"] = quality.sqnr_db(error)

    return measure


def _error(x: torch.Tensor, weight: torch.Tensor, source: Source, linear: str) -> float:
    """x float32 [T, K], weight float32 [N, K]."""
    meant = x @ weight.T
    reference = quality.square_sum(meant)
    return quality.square_sum(meant - _product(x, source, linear, source.schemes.get(linear))) / reference \
        if reference > 0 else 0.0


def _product(x: torch.Tensor, source: Source, linear: str, scheme: Scheme | None) -> torch.Tensor:
    """float32 [T, N], as an engine has it that computes in float32."""
    if scheme is not None and scheme.activations == "outliers":
        tensor: QuantizedTensor = source.read_quantized(linear)
        return mixed_product(x, vectorwise_int8.signed_codes(tensor), tensor.extra["absmax"], scheme.outlier_threshold)
    if scheme is not None and scheme.activations:
        static = source.read_quantized(linear).extra[INPUT_SCALE] if scheme.activations == "tensor" else None
        x = round_inputs(x, scheme, static)
    return x @ source.decoded(linear).T
