"""What a config.json says in the keys that qtool itself reads, checked once: others may have written it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qtool.checkpoint.header import AGAIN
from qtool.errors import CheckpointError, printable

NUMBERS = ("hidden_size", "vocab_size", "num_hidden_layers", "max_position_embeddings", "num_experts_per_tok")
NUMBERS_OF_LAYERS = ("intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "sliding_window",
                     "num_local_experts", "num_experts")  # some families have a list, a number for each layer
TEXTS = ("model_type", "dtype", "torch_dtype")
PARTS = ("text_config", "quantization_config", "compression_config", "quantization")
LARGEST = 1 << 40


def checked(config: dict[str, Any], where: str) -> dict[str, Any]:
    """The config itself. Raises CheckpointError naming the key."""
    _check(config, where)
    if isinstance(config.get("text_config"), Mapping):
        _check(config["text_config"], f"{where}: text_config")
    return config


def _check(config: Mapping[str, Any], where: str) -> None:
    wrong = [(key, "a number") for key in NUMBERS if not _number(config.get(key))]
    wrong += [(key, "a number") for key in NUMBERS_OF_LAYERS if not _number(config.get(key)) and not (
        isinstance(config[key], list) and all(map(_number, config[key])))]
    wrong += [(key, "text") for key in TEXTS if not isinstance(config.get(key), str | None)]
    wrong += [(key, "an object") for key in PARTS if not isinstance(config.get(key), dict | None)]
    names = config.get("architectures")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        wrong.append(("architectures", "a list of names"))
    if wrong:
        key, wanted = wrong[0]
        raise CheckpointError(f"{where}: {key} is {printable(repr(config[key]), 60)}, not {wanted}; {AGAIN}")


def _number(value: Any) -> bool:
    """Or nothing."""
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < LARGEST)
