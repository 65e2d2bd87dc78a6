"""Loading a checkpoint's tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qtool.errors import CalibrationError
from qtool.explained import Explained

FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt", "tekken.json")


def present(directory: Path) -> bool:
    """Whether the folder holds any tokenizer file."""
    return any((directory / name).is_file() for name in FILES)


def load(directory: Path) -> Any:
    """The tokenizer in `directory`, by transformers, without remote code. Raises CalibrationError."""
    from transformers import AutoTokenizer

    if not present(directory):
        raise CalibrationError(f"{directory}: no tokenizer found ({', '.join(FILES[:3])} ...); copy the model's "
                               "tokenizer files there, calibration needs them")
    with Explained(directory, "the tokenizer cannot be loaded", "download its tokenizer files again", CalibrationError):
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)


def starts_with_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer itself puts a beginning-of-text token first (Gemma and Llama 3 do, SmolLM2 does not)."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a").input_ids[:1] == [bos]
