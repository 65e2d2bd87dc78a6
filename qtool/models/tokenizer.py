"""Loading a checkpoint's tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qtool import heap
from qtool.errors import CalibrationError

FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt", "tekken.json")


def present(directory: Path) -> bool:
    """Whether the folder holds any tokenizer file."""
    return any((directory / name).is_file() for name in FILES)


def load(directory: Path) -> Any:
    """The tokenizer in `directory`, by transformers, without remote code. Raises CalibrationError."""
    from transformers import AutoTokenizer

    if not present(directory):
        raise CalibrationError(f"{directory}: no tokenizer found ({', '.join(FILES[:3])} ...); calibration needs one")
    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError) as error:
        heap.raise_exhausted(error)
        raise CalibrationError(f"{directory}: the tokenizer cannot be loaded: {' '.join(str(error).split())[:300]}") \
            from None


def starts_with_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer itself puts a beginning-of-text token first (Gemma and Llama 3 do, SmolLM2 does not)."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a").input_ids[:1] == [bos]
