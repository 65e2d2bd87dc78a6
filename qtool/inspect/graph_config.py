"""Whether genai_config.json says of a graph what the graph is, as onnxruntime-genai takes it.

Source: onnxruntime-genai src/config.cpp, src/models/decoder_only.cpp.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

FILE = "genai_config.json"
WHOLE = ("head_size", "hidden_size", "num_attention_heads", "num_hidden_layers", "num_key_value_heads")


def faults(config: Mapping[str, Any], inputs: Mapping[str, list[Any]], outputs: Mapping[str, list[Any]],
           file: str) -> Iterator[str]:
    """One sentence for each. inputs, outputs: of the graph, name -> sizes (a name for those that vary).  file: its."""
    model = config.get("model")
    decoder = model.get("decoder") if isinstance(model, Mapping) else None
    if not isinstance(model, Mapping) or not isinstance(decoder, Mapping):
        yield f"{FILE} has no model with a decoder"
        return
    wrong = [key for key in WHOLE if type(decoder.get(key)) is not int or decoder[key] < 1]
    wrong += [key for key in ("vocab_size", "context_length") if type(model.get(key)) is not int or model[key] < 1]
    if wrong:
        yield f"{FILE}: {', '.join(wrong)} must be positive whole numbers"
        return
    if decoder.get("filename") != file:
        yield f"{FILE}: decoder.filename is {decoder.get('filename')!r}, not {file}"
    for place, values in (("inputs", inputs), ("outputs", outputs)):
        yield from _names(place, decoder, values)
    logits = outputs.get(str((decoder.get("outputs") or {}).get("logits")), [])
    if logits and logits[-1] != model["vocab_size"]:
        yield f"{FILE}: vocab_size is {model['vocab_size']}, but the graph gives logits of {logits[-1]}"
    past = inputs.get(str((decoder.get("inputs") or {}).get("past_key_names")).replace("%d", "0"), [])
    if len(past) == 4 and (past[1], past[3]) != (decoder["num_key_value_heads"], decoder["head_size"]):
        yield (f"{FILE}: {decoder['num_key_value_heads']} heads of {decoder['head_size']} for keys, but the graph has "
               f"{past[1]} of {past[3]}")


def _names(place: str, decoder: Mapping[str, Any], values: Mapping[str, list[Any]]) -> Iterator[str]:
    """Every name stands for a value of the graph, and every value has a name; %d is the number of a layer."""
    said, known = decoder.get(place), set[str]()
    for key, name in (said.items() if isinstance(said, Mapping) else ()):
        layers = range(decoder["num_hidden_layers"]) if "%d" in str(name) else range(1)
        names = [str(name).replace("%d", str(index)) for index in layers]
        known.update(names)
        missing = [one for one in names if one not in values]
        if missing:
            yield f"{FILE}: decoder.{place}.{key} is {name!r}, but the graph has no {missing[0]}"
    for name in sorted(values.keys() - known):
        yield f"{FILE}: decoder.{place} has no name for {name} of the graph"
