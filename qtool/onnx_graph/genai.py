"""genai_config.json and the tokenizer files, as onnxruntime-genai reads them.

Source: onnxruntime-genai, src/python/py/models/builders/base.py (what its own builder writes).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qtool.errors import CheckpointError
from qtool.models.decoder import Decoder
from qtool.onnx_graph.decoder import PAST_NAMES, PRESENT_NAMES

MODEL_FILE = "model.onnx"
CONFIG_FILE = "genai_config.json"
SAMPLING = {"diversity_penalty": 0.0, "do_sample": False, "length_penalty": 1.0, "no_repeat_ngram_size": 0,
            "num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0, "temperature": 1.0, "top_k": 50,
            "top_p": 1.0}
LOADERS = (
    ("onnxruntime-genai",
     "import onnxruntime_genai as og\n"
     "model = og.Model(\"DIR\")\n"
     "tokenizer = og.Tokenizer(model)\n"
     "parameters = og.GeneratorParams(model)\n"
     "parameters.set_search_options(max_length=100)\n"
     "generator = og.Generator(model, parameters)\n"
     "generator.append_tokens(tokenizer.encode(\"Hello\"))\n"
     "while not generator.is_done():\n"
     "    generator.generate_next_token()\n"
     "print(tokenizer.decode(generator.get_sequence(0)))"),
)


def files(decoder: Decoder, config: Mapping[str, Any], folder: Path) -> dict[str, dict[str, Any]]:
    """File name -> JSON. config: config.json of the model, whose generation_config.json and tokenizer_config.json lie
    in `folder`, if it has them."""
    generation, tokenizer = (_json(folder / name) for name in ("generation_config.json", "tokenizer_config.json"))
    made = {CONFIG_FILE: _settings(decoder, config, generation)}
    if tokenizer:  # it may hold 1e30, meaning no limit, which is no int of onnxruntime-genai
        made["tokenizer_config.json"] = {**tokenizer, "model_max_length": decoder.positions}
    return made


def _settings(decoder: Decoder, config: Mapping[str, Any], generation: Mapping[str, Any]) -> dict[str, Any]:
    def token(name: str) -> Any:
        return next((one[name] for one in (generation, config) if one.get(name) is not None), None)

    end = token("eos_token_id")
    first_end = end[0] if isinstance(end, list) and end else end
    tokens = {"bos_token_id": token("bos_token_id"), "eos_token_id": end,
              "pad_token_id": token("pad_token_id") if token("pad_token_id") is not None else first_end}
    sampling = {key: default if generation.get(key) is None else generation[key] for key, default in SAMPLING.items()}
    inputs = {"input_ids": "input_ids", "attention_mask": "attention_mask",
              **{f"past_{kind}_names": name for kind, name in PAST_NAMES.items()}}
    outputs = {"logits": "logits", **{f"present_{kind}_names": name for kind, name in PRESENT_NAMES.items()}}
    return {
        "model": {
            **{name: value for name, value in tokens.items() if value is not None},
            "context_length": decoder.positions,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": MODEL_FILE, "head_size": decoder.head_size, "hidden_size": decoder.hidden,
                "inputs": inputs, "outputs": outputs, "num_attention_heads": decoder.heads,
                "num_hidden_layers": decoder.layers, "num_key_value_heads": decoder.key_heads,
            },
            "type": decoder.skeleton.model_type, "vocab_size": decoder.vocabulary,
        },
        "search": {**sampling, "early_stopping": True, "max_length": decoder.positions, "min_length": 0,
                   "past_present_share_buffer": True},
    }


def _json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; {} where there is none."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}); fetch the file again") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds no JSON object; fetch the file again")
    return found
