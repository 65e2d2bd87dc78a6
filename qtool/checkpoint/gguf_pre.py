"""Which of llama.cpp's rules splits a text into words as a byte-level BPE tokenizer does: tokenizer.ggml.pre.

llama.cpp has the rules in its code (src/llama-vocab.cpp) and names them. Its converter knows a tokenizer by the hash of
the tokens of a fixed text; here a tokenizer that has no known hash is recognised by its rule, if that is one of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qtool.errors import PlanError
from qtool.explained import Explained

# The text of llama.cpp's converter
TEXT = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶\u200d🌫\ufe0f (multiple emojis concate"
    "nated) ✅ 🦙🦙 3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 កាន់តែពិសេសអាច😁 ?我想在app"
    "le工作1314151天～ ------======= нещо на Български ''''''```````\"\"\"\"......!!!!!!?????? I've "
    "been 'told he's there, 'RE you sure? 'M not sure I'll make it, 'D you like some tea? We'Ve a'l"
    "L"
)
# sha256 of the list of its tokens -> rule; those of the families that are written. conversion/base.py, llama.cpp
HASHES = {
    "1431a23e583c97432bc230bff598d103ddb5a1f89960c8f1d1051aaa944d0b35": "minerva-7b",
    "d4540891389ea895b53b399da6ac824becc30f2fba0e9ddbb98f92e55ca0e97c": "qwen2",
    "0fe1cf6eda062318a1af7270f3331a85c539a01778ff948e24388e949c5282f4": "gpt-2",
    "0ef9807a4087ebef797fc749390439009c3b9eda9ad1a097abbe738f486c01e5": "llama-bpe",
    "049ecf7629871e3041641907f3de7c733e4dbfdc736f57d882ba0b0845599754": "deepseek-llm",
    "347715f544604f9118bb75ed199f68779f423cabb20db6de6f31b908d04d7821": "deepseek-coder",
    "9d032fcbd5501f4a38150912590928bfb36091efb5df11b8e2124b0390e3fb1e": "falcon3",
    "35d91631860c815f952d711435f48d356ebac988362536bed955d43bfa436e34": "starcoder",
    "3ce83efda5659b07b1ad37ca97ca5797ea4285d9b9ab0dc679e4a720c9da7454": "gpt-2",
    "e636dc30a262dcc0d8c323492e32ae2b70728f4df7dfe9737d9f920a282b8aea": "qwen2",
    "a8594e3edff7c29c003940395316294b2c623e09894deebbc65f33f1515df79e": "dbrx",
    "c136ed14d01c2745d4f60a9596ae66800e2b61fa45643e72436041855ad4089d": "smaug-bpe",
    "7fc505bd3104ca1083b150b17d088b59534ede9bde81f0dd2090967d7fe52cee": "viking",
    "63b97e4253352e6f357cc59ea5b583e3a680eaeaf2632188c2b952de2588485e": "tekken",
    "855059429035d75a914d1eda9f10a876752e281a054a7a3d421ef0533e5b6249": "smollm",
    "d4c8f286ea6b520b3d495c4455483cfa2302c0cfcd4be05d781b6a8a0a7cdaf1": "megrez",
    "b3f499bb4255f8ca19fccd664443283318f2fd2414d5e0b040fbdd0cc195d6c5": "deepseek-r1-qwen",
    "ccc2ef013c104be7bae2965776d611e1d7a8a2a9c547dd93a682c9a9fc80352e": "gpt-4o",
    "0e9433cbbb161f89e264eb32e8e64bfe69e834973ffca5d41d3948a604a3e2a3": "pixtral",
    "d5f1dd6f980fec569fb218a81a7658ac45fc56b38c5a0adeb1c232fbe04ef5ec": "seed-coder",
    "b0a6b1c0bd5998ebd9df08611efde34a4ff03faed45ae09c43e6b31ebd4b94cf": "a.x-4.0",
    "f6791d196f87ce6b56a7d234be618e0d58f8cda3549416635b2bebcd22cd95c4": "midm-2.0",
    "a1e163ecab2e718a4c829d1148b6e86824ec36163bb71941c3dca9cd5ac25756": "mellum",
    "4a2e2abae11ca2b86d570fc5b44be4d5eb5e72cc8f22dd136a94b37da83ab665": "kormo",
    "862f827721df956049dff5ca81a57f29e575280bc622e290d3bf4e35eca29015": "f2llmv2",
}
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
ENDS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
CASED = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
         r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*")
OTHERS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
LLAMA3 = rf"{WORDS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{OTHERS}|{ENDS}"
QWEN2 = rf"{WORDS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{OTHERS}|{ENDS}"
TEKKEN = rf"{CASED[0]}|{CASED[1]}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{ENDS}"
GPT4O = rf"{CASED[0]}{WORDS}?|{CASED[1]}{WORDS}?|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{ENDS}"
# (steps of the pre-tokenizer, whether whole words are looked up before merging) -> rule
RULES = {
    (("bytes, by words",), False): "gpt-2",
    (("digits", "bytes, by words"), False): "smollm",
    ((LLAMA3, "bytes"), True): "llama-bpe",
    ((LLAMA3, "bytes"), False): "smaug-bpe",
    ((QWEN2, "bytes"), False): "qwen2",
    ((TEKKEN, "bytes"), True): "tekken",
    ((GPT4O, "bytes"), False): "gpt-4o",
}


def rule(path: Path, tokenizer: Mapping[str, Any]) -> str:
    """The name of llama.cpp's rule for the tokenizer whose tokenizer.json `path` is. Raises PlanError."""
    found = HASHES.get(fingerprint(path))
    if found is None:
        steps = tuple(_steps(tokenizer.get("pre_tokenizer") or {}))
        found = RULES.get((steps, bool(tokenizer["model"].get("ignore_merges"))))
    if found is None:
        raise PlanError(f"{path}: its way to split text into words ({_kinds(tokenizer)}) is none that llama.cpp is "
                        "known to have, and with another one the model would read other tokens; make the GGUF file "
                        "with the converter of a newer llama.cpp and give that file to qtool instead")
    return found


def fingerprint(path: Path) -> str:
    """By what llama.cpp's converter knows a tokenizer."""
    from tokenizers import Tokenizer

    with Explained(path, "is no usable tokenizer", "download the file again"):
        ids = Tokenizer.from_file(str(path)).encode(TEXT).ids
    return hashlib.sha256(str(ids).encode()).hexdigest()


def _steps(node: Mapping[str, Any]) -> list[str]:
    """What a pre-tokenizer does, one word or regular expression a step."""
    kind = node.get("type")
    if kind == "Sequence":
        return [step for part in node["pretokenizers"] for step in _steps(part)]
    if kind == "ByteLevel" and not node.get("add_prefix_space"):
        return ["bytes, by words" if node.get("use_regex", True) else "bytes"]
    if kind == "Digits" and node.get("individual_digits"):
        return ["digits"]
    whole = (node.get("behavior"), bool(node.get("invert"))) in (("Isolated", False), ("Removed", True))
    if kind == "Split" and whole and "Regex" in node["pattern"]:
        return [str(node["pattern"]["Regex"])]
    return [f"unknown: {kind}"]


def _kinds(tokenizer: Mapping[str, Any]) -> str:
    node = tokenizer.get("pre_tokenizer") or {}
    return ", ".join(str(part.get("type")) for part in node.get("pretokenizers", [node]))
