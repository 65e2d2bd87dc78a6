"""How fast a checkpoint runs here: prompt and generated tokens per second, time to the first token.

Tokens are drawn at random (fixed seed): speed does not depend on what they say. Generation is greedy, one sequence,
with a cache of keys and values. A short run comes first, so that no figure contains what only the first call costs.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch

from qtool.decode import Source
from qtool.errors import InputError
from qtool.models import skeleton
from qtool.runtime.decoder import Decoder, open_decoder
from qtool.runtime.load import fill

WARM_PROMPT, WARM_TOKENS = 8, 2
Generate = Callable[[torch.Tensor, int], tuple[float, float]]  # ids [P], tokens -> seconds to the first, of the others


def measure(source: Source, device: torch.device, prompt_tokens: int = 512, new_tokens: int = 64,
            rounded: bool = False) -> dict[str, Any]:
    """Times one prompt and the greedy generation after it.

    rounded: inputs of linears are rounded to 8 bits, as llama.cpp does; for native kernels only.
    Returns prompt_tokens, new_tokens: as asked for, fewer where the model has fewer positions.  prompt_tokens_per_s.
    tokens_per_s: of the tokens after the first.  first_token_s: seconds from the prompt to the first token.
    kernels: what ran it: "native" (runtime/decoder.py) or "transformers", with linears that hold packed weights.
    reason: why it was not native, or None. Raises InputError, ModelError.
    """
    positions = source.config.get("max_position_embeddings")
    prompt, new = _fitting(prompt_tokens, new_tokens, positions if isinstance(positions, int) else None)
    decoder, reason = open_decoder(source, prompt + new, rounded) if device.type == "cpu" else (None, "not on a CPU")
    if decoder is not None:
        generate, vocabulary = functools.partial(_native, decoder), len(decoder.embedding)
    else:
        bones = skeleton.build(source.directory, source.config, source.specs)
        vocabulary = bones.vocabulary
        generate = functools.partial(_with_transformers, fill(bones, source, device))
    ids = torch.randint(vocabulary, (prompt,), generator=torch.Generator().manual_seed(0)).to(device)
    first, rest = timed(generate, ids, new)
    return {"prompt_tokens": prompt, "new_tokens": new, "prompt_tokens_per_s": prompt / first,
            "tokens_per_s": (new - 1) / rest, "first_token_s": first,
            "kernels": "transformers" if decoder is None else "native", "reason": reason or None}


@torch.inference_mode()
def timed(generate: Generate, ids: torch.Tensor, new_tokens: int) -> tuple[float, float]:
    """Seconds to the first token after `ids` [P] and for all that follow, after a short run that is not counted."""
    generate(ids[:WARM_PROMPT], WARM_TOKENS)
    return generate(ids, new_tokens)


def _with_transformers(model: Any, ids: torch.Tensor, new_tokens: int) -> tuple[float, float]:
    start, step, past = _now(ids.device), ids[None], None
    first = start
    for index in range(new_tokens):
        output = model(step, past_key_values=past, use_cache=True, logits_to_keep=1)
        step, past = output.logits[:, -1:].argmax(-1), output.past_key_values
        if index == 0:
            first = _now(ids.device)
    return first - start, _now(ids.device) - first


def _native(decoder: Decoder, ids: torch.Tensor, new_tokens: int) -> tuple[float, float]:
    decoder.length = 0
    start, step = _now(ids.device), ids
    first = start
    for index in range(new_tokens):
        step = decoder.step(step).argmax()[None]
        if index == 0:
            first = _now(ids.device)
    return first - start, _now(ids.device) - first


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _fitting(prompt_tokens: int, new_tokens: int, positions: int | None) -> tuple[int, int]:
    if prompt_tokens < 1 or new_tokens < 2:
        raise InputError(f"{prompt_tokens} prompt tokens and {new_tokens} new ones: at least 1 and 2 are needed")
    if positions is None or prompt_tokens + new_tokens <= positions:
        return prompt_tokens, new_tokens
    new = max(2, min(new_tokens, positions // 4))
    if positions <= new:
        raise InputError(f"a model of {positions} positions is too short to time")
    return positions - new, new
