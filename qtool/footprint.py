"""Memory that a checkpoint needs to run, from its config and headers; no weight is read.

Weights and keys and values are exact. Activations and overhead depend on the engine: they are what one needs that
feeds prompts in pieces and computes attention without a matrix of scores, as vLLM and llama.cpp do.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qtool.decode import Source
from qtool.errors import InputError, ModelError
from qtool.models import skeleton
from qtool.tensors import NAMES_OF_DTYPES

CHUNK = 2048  # prompt tokens that go through the model at one time; vLLM's and llama.cpp's usual batch
RUNTIME = 512 << 20  # libraries, a CUDA context with its kernels, workspaces: 300 to 600 MiB in practice
BITS = {"fp32": 32.0, "bf16": 16.0, "fp16": 16.0, "fp8": 8.0, "q8_0": 8.5, "q4_0": 4.5}  # of a cached value
DTYPES = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}
BLOCK = 32  # values that q8_0 and q4_0 store together
WINDOWS = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
NUMBERED = re.compile(r"(?:^|\.)(\d+)\.(.*)\.([^.]+)\.weight$")  # block, module in it, linear
KEYS, VALUES, LATENT = "k_proj", "v_proj", "kv_a_proj_with_mqa"
FUSED = ("qkv_proj", "query_key_value", "Wqkv")
LATENT_FAMILIES = ("deepseek_v2", "deepseek_v3", "youtu", "mistral4", "glm4_moe_lite")  # whose caches hold the latent
BESIDE = ("in_proj", "conv", "wk", "weights_proj")  # begin the names of linears of recurrent states and indexers


def inference(source: Source, context: int, batch: int, kv_dtype: str | None = None) -> dict[str, Any]:
    """Bytes to run `batch` sequences of `context` tokens: weights, kv_cache, activations, overhead and their total.

    kv_dtype: a key of BITS; None: FP8 where the checkpoint has scales for it, else the model's dtype.  Also in it:
    context, batch, kv_dtype, and notes (what the figures leave out). Where the cache of the family is not known,
    kv_cache and total are None and a note says why. Raises InputError.
    """
    refuse_empty(context, batch)
    kv_dtype = _cache_dtype(source, kv_dtype)
    notes: list[str] = []
    values: dict[str, Any] = source.config
    cache: int | None = None
    try:
        values = skeleton.config_values(source.directory, source.config, source.specs)
        cache = kv_cache(source, values, context, batch, kv_dtype)
    except ModelError as error:
        notes.append(f"keys and values: {error}")
    positions = values.get("max_position_embeddings")
    if isinstance(positions, int) and context > positions:
        notes.append(f"the model was made for {positions} positions, fewer than a context of {context}")
    weights, computing = stored_bytes(source), activations(source, values, context, batch)
    total = None if cache is None else weights + cache + computing + RUNTIME
    return {"context": context, "batch": batch, "kv_dtype": kv_dtype, "weights": weights, "kv_cache": cache,
            "activations": computing, "overhead": RUNTIME, "total": total, "notes": notes}


def stored_bytes(source: Source) -> int:
    """Bytes of all tensors as they are stored, which is how engines hold them."""
    if source.kind != "gguf":
        return source.weight_bytes()
    return sum(gguf_bytes(source).values())


def gguf_bytes(source: Source) -> dict[str, int]:
    """Bytes of a GGUF file's tensors by block type."""
    from qtool.checkpoint.gguf_header import read_gguf_header

    sizes: dict[str, int] = {}
    for tensor in read_gguf_header(Path(source.origin)).tensors.values():
        sizes[tensor.kind.name] = sizes.get(tensor.kind.name, 0) + tensor.nbytes
    return sizes


def kv_cache(source: Source, values: Mapping[str, Any], context: int, batch: int, kv_dtype: str) -> int:
    """Σ over the layers of batch · min(context, window) · (key values + cached values of a token) · bits / 8.

    What a token adds is read from the headers: the rows of k_proj and v_proj, so grouped heads and heads of any width
    are right; of a fused projection, what is not queries; with multi-head latent attention (DeepSeek-V2,
    arXiv 2405.04434) the latent and the rotated key, the rows of kv_a_proj_with_mqa. A layer that slides keeps its
    window. values: config.json with the defaults of its class. Raises ModelError where that is not all there is.
    """
    layers = _rows(source)
    kinds = _kinds(values, len(layers))
    total = 0.0
    for index, kind in enumerate(kinds):
        window = values.get(WINDOWS[kind]) if kind in WINDOWS else None
        kept = min(context, window) if isinstance(window, int) else context
        for width in _cached(layers.get(index, {}), values, f"layer {index}"):
            if kv_dtype in ("q8_0", "q4_0") and width % BLOCK:
                raise ModelError(f"{kv_dtype} has blocks of {BLOCK} values, but layer {index} caches {width} a token")
            total += batch * kept * width * BITS[kv_dtype] / 8
    return int(total)


def activations(source: Source, values: Mapping[str, Any], context: int, batch: int) -> int:
    """min(batch · context, 2048) tokens · (2 · hidden + the widest module) · itemsize, and the logits of each sequence.

    2 · hidden: the residual stream and its norm. The widest module is the attention, MLP or experts of a token whose
    linears have the most outputs, with its widest input: q, k, v, o, or gate, up, their product, down. Logits of one
    token a sequence are there in the model's dtype and in float32.
    """
    modules: dict[str, tuple[int, int]] = {}
    for name, spec in source.specs.items():
        found = NUMBERED.search(name)
        if found and len(spec.shape) == 2:
            parent = name.removesuffix(f".{found[3]}.weight")
            rows, widest = modules.get(parent, (0, 0))
            modules[parent] = rows + spec.shape[0], max(widest, spec.shape[1])
    active = values.get("num_experts_per_tok") or 1
    per_token = max((sum(sizes) * (active if re.search(r"\.experts\.\d+$", parent) else 1)
                     for parent, sizes in modules.items()), default=0)
    hidden, vocabulary = (values.get(key) or 0 for key in ("hidden_size", "vocab_size"))
    size = source.dtype.itemsize
    return min(batch * context, CHUNK) * (2 * hidden + per_token) * size + batch * vocabulary * (size + 4)


def refuse_empty(context: int, batch: int) -> None:
    """Raise InputError for a context or batch that is none."""
    if context < 1 or batch < 1:
        raise InputError(f"--context {context} --batch {batch}: both are at least 1")


def _cache_dtype(source: Source, kv_dtype: str | None) -> str:
    if kv_dtype is not None and kv_dtype not in BITS:
        raise InputError(f"a cache in '{kv_dtype}' is not known; use one of {', '.join(BITS)}")
    scales = getattr(source.format, "KV_SCALES", ("",))[0]
    calibrated = scales and any(name.endswith(f".{scales}") for name in source.checkpoint.specs)
    return kv_dtype or ("fp8" if calibrated else DTYPES.get(NAMES_OF_DTYPES[source.dtype], "bf16"))


def _rows(source: Source) -> dict[int, dict[str, int]]:
    """Of each numbered block, the outputs of its linears by their name in their module, e.g. 3: {"k_proj": 64}."""
    layers: dict[int, dict[str, int]] = {}
    for name, spec in source.specs.items():
        found = NUMBERED.search(name)
        if found and len(spec.shape) == 2 and not re.search(r"\.\d+\.", f".{found[2]}."):  # no experts
            layers.setdefault(int(found[1]), {})[found[3]] = spec.shape[0]
    return layers


def _kinds(values: Mapping[str, Any], blocks: int) -> list[str]:
    """Which kind of attention each layer has, as transformers' caches read it from the config."""
    count = values.get("num_hidden_layers")
    if not isinstance(count, int) or not isinstance(values.get("num_attention_heads"), int):
        raise ModelError(f"{values.get('model_type')} has no num_hidden_layers and num_attention_heads, so what it "
                         "keeps of past tokens is not known here")
    plain = next((kind for kind, key in WINDOWS.items() if values.get(key) is not None), "full_attention")
    kinds = list(values.get("layer_types") or [plain] * count)
    strange = sorted({kind for kind in kinds if kind not in ("full_attention", *WINDOWS)})
    if values.get("num_kv_shared_layers") or values.get("kv_sharing_modes"):
        strange = ["layers that share keys and values"]
    if strange or len(kinds) != count:
        raise ModelError(f"{values.get('model_type')} has {', '.join(strange) or f'{len(kinds)} layer types'}; what "
                         "such layers keep of past tokens is not known here")
    return kinds


def _cached(linears: Mapping[str, int], values: Mapping[str, Any], where: str) -> tuple[int, ...]:
    """Values that a layer keeps of each token: (keys, values), or the latent alone."""
    if any(name.startswith(BESIDE) for name in linears):
        raise ModelError(f"{where} keeps a state or an index beside its keys and values, of a size not known here")
    if LATENT in linears and values.get("model_type") in LATENT_FAMILIES:
        return linears[LATENT],
    if KEYS in linears and VALUES in linears:
        return linears[KEYS], linears[VALUES]
    fused = next((linears[name] for name in FUSED if name in linears), None)
    heads, groups = values.get("num_attention_heads"), values.get("num_key_value_heads")
    if fused is None or not heads:
        raise ModelError(f"{where} has no {KEYS} and {VALUES}, nor {', '.join(FUSED)}: what it keeps of past tokens "
                         "is not known here")
    groups, head = groups or heads, values.get("head_dim") or values.get("hidden_size", 0) // heads
    if fused != (heads + 2 * groups) * head:
        raise ModelError(f"{where}: its {fused} queries, keys and values are not those of {heads} and {groups} heads "
                         f"of {head}")
    return groups * head, groups * head
