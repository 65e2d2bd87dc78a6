"""Whether the programs that load a format find what they look for: keys, dtypes, shapes, config; and what they lack.

A key that is missing or of another shape is a fault of the files. That a program has no kernel for a scheme is none: it
is told as a limit. What is known of the programs: transformers 5.23, vLLM 0.32, GPTQModel 7, mlx-lm, llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtool.decode import Source
from qtool.inspect import loader_config, loader_gguf, loader_keys
from qtool.recipe import Scheme
from qtool.tensors import NAMES_OF_DTYPES, TensorSpec

Limit = Callable[[Scheme, tuple[int, int]], str | None]
VLLM_GROUPS = (-1, 32, 64, 128)
LISTED = 20  # problems of one program
TENSOR_PARALLEL, SPLIT = (2, 4, 8), ("o_proj", "down_proj", "out_proj", "w2")


@dataclass(frozen=True)
class Loader:
    """needs: keys of the quantization_config; a | b is one of them. limit: why it does not run a linear."""

    name: str
    needs: tuple[str, ...] = ()
    limit: Limit = lambda scheme, shape: None


def _vllm_integers(bits: tuple[int, ...], symmetric: bool) -> Limit:
    def limit(scheme: Scheme, shape: tuple[int, int]) -> str | None:
        if scheme.grid != "affine" or scheme.activations:
            return None
        if scheme.bits not in bits or (symmetric and not scheme.symmetric):
            kind = "" if scheme.symmetric or not symmetric else " with zero points"
            return f"no kernel for {scheme.bits} bits{kind}"
        return None if scheme.group_size in VLLM_GROUPS else f"no kernel for groups of {scheme.group_size}"
    return limit


def _by_32(scheme: Scheme, shape: tuple[int, int]) -> str | None:
    return "outputs and inputs must be multiples of 32" if shape[0] % 32 or shape[1] % 32 else None


def _by_128(scheme: Scheme, shape: tuple[int, int]) -> str | None:
    return "reads blocks wrongly unless outputs and inputs are multiples of 128" \
        if scheme.strategy == "block" and (shape[0] % 128 or shape[1] % 128) else None


LOADERS: dict[str, tuple[Loader, ...]] = {
    "compressed-tensors": (Loader("transformers", ("config_groups", "quantization_status")),
                           Loader("vLLM", ("config_groups", "format"), _vllm_integers((4, 8), False))),
    "gptq": (Loader("GPTQModel", ("bits", "group_size"), _by_32),
             Loader("transformers", ("bits", "group_size"), _by_32),
             Loader("vLLM", ("bits", "group_size", "desc_act", "sym"), _vllm_integers((4, 8), True))),
    "awq": (Loader("GPTQModel", ("bits|w_bit", "group_size|q_group_size"), _by_32),
            Loader("transformers", ("bits|w_bit", "group_size|q_group_size"), _by_32),
            Loader("vLLM", ("bits|w_bit", "group_size|q_group_size", "zero_point"), _vllm_integers((4,), False))),
    "bitsandbytes": (Loader("transformers", ("load_in_4bit|load_in_8bit|_load_in_4bit|_load_in_8bit",)),),
    "fp8": (Loader("transformers", (), _by_128), Loader("vLLM", ("activation_scheme",))),
    "mlx": (Loader("mlx-lm", ("bits", "group_size")),),
    "modelopt": (Loader("vLLM", ("quant_algo",)),),
    "aqlm": (Loader("transformers", ("num_codebooks", "nbits_per_codebook")),),
}


def check(source: Source) -> list[dict[str, Any]]:
    """One entry per program that loads this format: loader, problems (sentences, faults of the files), limits.

    From headers and config alone; the names and shapes of what is not quantized are checked with the architecture.
    """
    if source.kind == "gguf":
        return [{"loader": "llama.cpp", "problems": loader_gguf.faults(Path(source.origin)), "limits": []}]
    if source.format is None or source.format.NAME not in LOADERS:
        return []
    config, faults = source.quantization(), _keys(source, source.format.NAME)
    of_config = loader_config.faults(source)
    conflicts = source.format.fused_conflicts(source.schemes)
    found = []
    for loader in LOADERS[source.format.NAME]:
        missing = [key for key in loader.needs if not any(one in config for one in key.split("|"))]
        problems = [*(f"config.json: quantization_config has no {key.replace('|', ' or ')}, which {loader.name} needs"
                      for key in missing), *(text for who, text in of_config if not who or loader.name in who), *faults]
        limits = [*_limits(source, loader), *([*conflicts, *_shares(source)] if loader.name == "vLLM" else [])]
        found.append({"loader": loader.name, "problems": problems[:LISTED], "limits": limits})
    return found


def _keys(source: Source, format_: str) -> list[str]:
    """What of the quantized linears is not there, of another dtype or shape, or not known to any loader."""
    mine: dict[str, dict[str, TensorSpec]] = {linear: {} for linear in source.schemes}
    for name, spec in source.checkpoint.specs.items():
        for cut in range(len(parts := name.split(".")) - 1, 0, -1):
            if (linear := ".".join(parts[:cut])) in mine:
                mine[linear][".".join(parts[cut:])] = spec
                break
    problems = []
    for linear, there in mine.items():
        rows, columns = source.specs[f"{linear}.weight"].shape
        wanted = loader_keys.keys(format_, source.schemes[linear], (rows, columns), there)
        problems += [f"{linear}.{key.suffix}: {wrong}" for key in wanted if (wrong := _wrong(key, there))]
        known = {"bias", *(key.suffix for key in wanted)}
        problems += [f"{linear}.{suffix}: no loader of {format_} knows this tensor" for suffix in there
                     if suffix not in known]
    return problems


def _wrong(key: loader_keys.Key, there: Mapping[str, TensorSpec]) -> str | None:
    spec = there.get(key.suffix)
    if spec is None:
        return "is missing" if key.needed else None
    dtype = NAMES_OF_DTYPES.get(spec.dtype, str(spec.dtype))
    fits = any(len(shape) == len(spec.shape) and all(one in (None, other) for one, other
                                                     in zip(shape, spec.shape, strict=True)) for shape in key.shapes)
    if dtype in key.dtypes and fits:
        return None
    shapes = " or ".join(str(["any" if one is None else one for one in shape]) for shape in key.shapes)
    return f"is {dtype} {list(spec.shape)}, loaders want {' or '.join(key.dtypes)} {shapes}"


def _limits(source: Source, loader: Loader) -> list[str]:
    """Why the program does not run some linears, each reason once."""
    reasons: dict[str, list[str]] = {}
    for linear, scheme in source.schemes.items():
        rows, columns = source.specs[f"{linear}.weight"].shape
        reason = loader.limit(scheme, (rows, columns))
        if reason:
            reasons.setdefault(reason, []).append(linear)
    return [f"{reason}: {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
            for reason, names in reasons.items()]


def _shares(source: Source) -> list[str]:
    """Groups that vLLM cannot divide among several GPUs: of linears whose inputs it splits (tensor parallel)."""
    heads = (source.config.get("text_config") or source.config).get("num_attention_heads") or 0
    found = []
    for parts in TENSOR_PARALLEL:
        cut = [linear for linear, scheme in source.schemes.items() if linear.endswith(SPLIT) and not heads % parts
               and _cuts(scheme, source.specs[f"{linear}.weight"].shape[1], parts)]
        if cut:
            more = f" and {len(cut) - 1} more" if len(cut) > 1 else ""
            found.append(f"tensor parallel over {parts} GPUs would cut groups apart: {cut[0]}{more}")
            break  # and over more of them too
    return found


def _cuts(scheme: Scheme, columns: int, parts: int) -> bool:
    size = 1 if scheme.group_size == -1 else int(scheme.group_size)
    return bool(columns % parts or columns // parts % size)
