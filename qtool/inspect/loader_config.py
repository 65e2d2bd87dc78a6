"""The quantization_config as loaders take it: values of another type crash them, linears that it forgets do too.

From the same sources as loader_keys.py. A fault is (programs, sentence); no programs: all that load the format.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from qtool.decode import Source
from qtool.errors import ModelError
from qtool.models import outline, skeleton

Fault = tuple[tuple[str, ...], str]
Kind = tuple[Callable[[Any], bool], str]  # whether a value will do, and what would


def _one_of(*values: Any) -> Kind:
    return lambda value: any(type(value) is type(one) and value == one for one in values), \
        " or ".join(repr(one) for one in values)


def _or_null(kind: Kind) -> Kind:
    return lambda value: value is None or kind[0](value), f"{kind[1]} or null"


WHOLE: Kind = (lambda value: type(value) is int and value > 0, "a positive whole number")
GROUP: Kind = (lambda value: type(value) is int and (value == -1 or value > 0), "-1 or a positive whole number")
FLAG: Kind = (lambda value: type(value) is bool, "true or false")
NUMBER: Kind = (lambda value: type(value) in (int, float) and value >= 0, "a number from 0 on")
TEXTS: Kind = (lambda value: isinstance(value, list) and all(isinstance(one, str) for one in value), "a list of texts")
NAMED: Kind = (lambda value: isinstance(value, Mapping), "an object")
LIST: Kind = (lambda value: isinstance(value, list), "a list")
TEXT: Kind = (lambda value: isinstance(value, str), "a text")
SIDES: Kind = (lambda value: isinstance(value, list) and [type(one) for one in value] == [int, int],
               "a list of two whole numbers")

TOP: dict[str, dict[str, Kind]] = {
    "compressed-tensors": {
        "config_groups": NAMED, "ignore": TEXTS, "quantization_status": _one_of("compressed"),
        "format": _one_of("pack-quantized", "int-quantized", "float-quantized", "naive-quantized",
                          "nvfp4-pack-quantized", "mxfp4-pack-quantized", "mixed-precision"),
        "kv_cache_scheme": _or_null(NAMED)},
    "gptq": {"bits": _one_of(2, 3, 4, 8), "group_size": GROUP, "desc_act": FLAG, "sym": FLAG, "lm_head": FLAG,
             "checkpoint_format": _one_of("gptq", "gptq_v2"), "dynamic": _or_null(NAMED),
             "pack_dtype": _one_of("int32"), "modules_in_block_to_quantize": _or_null(LIST)},
    "awq": {"bits": _one_of(4), "w_bit": _one_of(4), "group_size": GROUP, "q_group_size": GROUP,
            "zero_point": _one_of(True), "version": _one_of("gemm", "gemv"), "modules_to_not_convert": _or_null(TEXTS)},
    "bitsandbytes": {
        "load_in_4bit": FLAG, "load_in_8bit": FLAG, "bnb_4bit_quant_type": _one_of("nf4", "fp4"),
        "bnb_4bit_use_double_quant": FLAG, "llm_int8_threshold": NUMBER, "llm_int8_skip_modules": _or_null(TEXTS),
        "bnb_4bit_compute_dtype": _one_of("bfloat16", "float16", "float32"),
        "bnb_4bit_quant_storage": _one_of("uint8", "bfloat16", "float16", "float32")},
    "fp8": {"activation_scheme": _one_of("dynamic", "static"), "weight_block_size": _or_null(SIDES),
            "modules_to_not_convert": _or_null(TEXTS), "fmt": _one_of("e4m3")},
    "mlx": {"bits": _one_of(2, 3, 4, 5, 6, 8), "group_size": _one_of(32, 64, 128), "mode": _one_of("affine")},
    "aqlm": {"in_group_size": WHOLE, "out_group_size": WHOLE, "num_codebooks": WHOLE, "nbits_per_codebook": WHOLE,
             "linear_weights_not_to_quantize": _or_null(TEXTS)},
    "modelopt": {"quant_algo": TEXT, "ignore": TEXTS,
                 "exclude_modules": TEXTS, "group_size": _or_null(WHOLE)},
}
ARGUMENTS: dict[str, Kind] = {  # of weights and inputs in compressed-tensors, where any other key is an error
    "num_bits": WHOLE, "type": _one_of("int", "float"), "symmetric": FLAG, "group_size": _or_null(GROUP),
    "strategy": _one_of("tensor", "channel", "group", "block", "token", "tensor_group", "attn_head"),
    "block_structure": _or_null(SIDES), "dynamic": _one_of(True, False, "local"),
    "actorder": _or_null(_one_of("weight", "static")), "scale_dtype": _or_null(TEXT),
    "zp_dtype": _or_null(TEXT), "observer": _or_null(TEXT), "observer_kwargs": _or_null(NAMED),
}
GROUP_KEYS = {"targets", "weights", "input_activations", "output_activations", "format"}


def faults(source: Source) -> list[Fault]:
    """What is wrong with the quantization_config of a checkpoint in one of the formats of TOP."""
    assert source.format is not None
    said, name = source.quantization(), str(source.format.NAME)
    if isinstance(said.get("quantization"), Mapping):  # ModelOpt's own file
        said = said["quantization"]
    found: list[Fault] = [((), wrong) for wrong in _types(said, TOP[name], "")]
    if name == "compressed-tensors":
        found += [((), wrong) for wrong in _groups(said)]
    if name == "mlx":
        found += [((), wrong) for wrong in _mlx(source, said)]
    if name == "bitsandbytes" and bool(said.get("load_in_4bit")) == bool(said.get("load_in_8bit")):
        found.append(((), _where("load_in_4bit and load_in_8bit must not be the same")))
    if name == "gptq" and said.get("sym") is False and _convention(said) == "gptq" and not _by_gptqmodel(said):
        found.append((("GPTQModel", "transformers"), _where("checkpoint_format gptq with sym false is refused; zero "
                                                            "points are stored as gptq_v2")))
    try:
        return found if found else _forgotten(source, said, name)
    except re.error as error:
        return [((), _where(f"{error.pattern!r} is no regular expression: {error}"))]


def _where(text: str) -> str:
    return f"config.json: quantization_config: {text}"


def _types(said: Mapping[str, Any], kinds: Mapping[str, Kind], place: str) -> list[str]:
    return [_where(f"{place}{key} is {said[key]!r}, not {wanted}") for key, (fits, wanted) in kinds.items()
            if key in said and not fits(said[key])]


def _groups(said: Mapping[str, Any]) -> list[str]:
    found = []
    for name, group in (said["config_groups"].items() if isinstance(said.get("config_groups"), Mapping) else ()):
        if not isinstance(group, Mapping) or not TEXTS[0](group.get("targets")):
            found.append(_where(f"{name} has no targets, a list of texts"))
            continue
        found += [_where(f"{name}.{key} is no key that loaders know, which is an error to them")
                  for key in group if key not in GROUP_KEYS]
        for part in ("weights", "input_activations", "output_activations"):
            one = group.get(part)
            if one is None:
                continue
            if not isinstance(one, Mapping):
                found.append(_where(f"{name}.{part} is {one!r}, not an object or null"))
                continue
            found += [_where(f"{name}.{part}.{key} is no key that loaders know, which is an error to them")
                      for key in one if key not in ARGUMENTS]
            found += _types(one, ARGUMENTS, f"{name}.{part}.")
    return found


def _mlx(source: Source, said: Mapping[str, Any]) -> list[str]:
    found = []
    modules = {spec.stored.removesuffix(".scales") for spec in source.checkpoint.specs.values()
               if spec.stored.endswith(".scales")}
    for name, own in said.items():
        if "." not in name:
            continue
        if own is not False and not isinstance(own, Mapping):
            found.append(_where(f"{name} is {own!r}, not an object or false"))
        elif isinstance(own, Mapping):
            found += _types(own, TOP["mlx"], f"{name}.")
            if name not in modules:
                found.append(_where(f"{name} has a scheme, but no scales: mlx-lm would look for them"))
    return found


def _convention(said: Mapping[str, Any]) -> str:
    return str(said.get("checkpoint_format") or said.get("format") or "gptq").lower()


def _by_gptqmodel(said: Mapping[str, Any]) -> bool:
    meta = said.get("meta")
    return "gptqmodel" in str(meta.get("quantizer") if isinstance(meta, Mapping) else "")


def _forgotten(source: Source, said: Mapping[str, Any], format_: str) -> list[Fault]:
    """Linears that are not quantized, but that a loader would take for quantized: it finds no weight of theirs."""
    covers = COVERED.get(format_)
    if covers is None:
        return []
    try:
        left = [name for name in _linears(source) if name not in source.schemes]
    except ModelError:
        return []  # told when the architecture is built
    programs, covered = covers
    lost = [name for name in left if not covered(said, name)]
    more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
    return [(programs, _where(f"{lost[0]}{more} is not quantized, but nothing here says so; loaders look for its codes "
                              f"({REMEDIES[format_]})"))] if lost else []


def _linears(source: Source) -> Iterable[str]:
    """The nn.Linear modules of the blocks as they are stored, and the output head."""
    described = source.directory, source.config, source.specs
    bones = outline.build(*described) or skeleton.build(*described)
    for index in range(len(bones.blocks)):
        for name in bones.block_linears(index):
            yield bones.stored(name)
    yield "lm_head"


def _by_transformers(entries: Iterable[str], name: str) -> bool:
    """transformers' should_convert_module."""
    return any(re.match(rf"{entry}\.", name) or re.match(rf"{entry}$", name) or name.endswith(entry)
               for entry in entries)


def _ignored(said: Mapping[str, Any], name: str) -> bool:
    targets = [target for group in said["config_groups"].values() for target in group["targets"]]

    def matches(entries: Iterable[str]) -> bool:
        return any(re.match(entry[3:], name) if entry.startswith("re:") else entry == name for entry in entries)

    return matches(said.get("ignore") or []) or not ("Linear" in targets or matches(targets))


def _left_out(said: Mapping[str, Any], name: str) -> bool:
    if name == "lm_head":
        return not said.get("lm_head")
    return any(rule.startswith("-:") and re.match(rule[2:], name) for rule in said.get("dynamic") or {})


def _skipped(key: str, head: bool) -> Callable[[Mapping[str, Any], str], bool]:
    """head: the output head is left alone even where the list does not have it."""
    return lambda said, name: (name == "lm_head" and (head or said.get(key) is None)) or _by_transformers(
        said.get(key) or [], name)


def _excluded(said: Mapping[str, Any], name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, entry) for entry in said.get("ignore", said.get("exclude_modules")) or [])


COVERED: dict[str, tuple[tuple[str, ...], Callable[[Mapping[str, Any], str], bool]]] = {
    "compressed-tensors": ((), _ignored), "gptq": (("GPTQModel",), _left_out),
    "awq": (("transformers", "vLLM"), _skipped("modules_to_not_convert", True)),
    "bitsandbytes": ((), _skipped("llm_int8_skip_modules", False)),
    "fp8": ((), _skipped("modules_to_not_convert", False)), "modelopt": ((), _excluded),
    "aqlm": ((), _skipped("linear_weights_not_to_quantize", False)),
}
REMEDIES = {"compressed-tensors": "put it into ignore", "gptq": "a rule -: under dynamic",
            "awq": "put it into modules_to_not_convert", "bitsandbytes": "put it into llm_int8_skip_modules",
            "fp8": "put it into modules_to_not_convert", "modelopt": "put it into ignore",
            "aqlm": "put it into linear_weights_not_to_quantize"}
