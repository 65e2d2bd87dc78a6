"""qtool export --to imatrix: what llama.cpp's own tool would find in transformers' model on the same tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader

from qtool import decode, export_imatrix
from qtool.checkpoint.gguf_families import gguf_name, written_as
from qtool.checkpoint.imatrix import read_imatrix
from qtool.models import importance
from tests import tiny
from tests.cli.conftest import run  # noqa: F401

SAMPLES, LENGTH = 6, 24
FAMILIES = [name for name in tiny.FAMILIES if name != "olmo2"]  # which GGUF files are not written of


def reference(folder: Path, ids: torch.Tensor) -> dict[str, tuple[torch.Tensor, list[float]]]:
    """GGUF name -> (sums of squares float64 [n_mat, K], tokens of each), by hooks on transformers' model in float32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    family = written_as(model.config.model_type)
    assert family is not None
    sums: dict[str, tuple[torch.Tensor, list[float]]] = {}

    def add(name: str, x: torch.Tensor, index: int = 0, count: int = 1) -> None:
        x = x.reshape(-1, x.shape[-1])
        known, tokens = sums.setdefault(name, (torch.zeros(count, x.shape[1], dtype=torch.float64), [0.0] * count))
        known[index] += x.double().square().sum(0)
        tokens[index] += len(x)

    def linear(name: str) -> Any:
        return lambda _module, inputs: add(name, inputs[0])

    def experts(layer: int) -> Any:
        def hook(module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            hidden, chosen, _ = inputs
            count = module.gate_up_proj.shape[0]
            for index in range(count):
                x = hidden[(chosen == index).any(-1)]
                gate, up = (x @ module.gate_up_proj[index].T).chunk(2, -1)
                for kind, values in (("gate", x), ("up", x), ("down", module.act_fn(gate) * up)):
                    add(f"blk.{layer}.ffn_{kind}_exps.weight", values, index, count)
        return hook

    embedding = model.get_input_embeddings().weight
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and module.weight is not embedding:
            target = gguf_name(f"{path}.weight", family)
            if target is not None and "gate_inp" not in target[0]:
                module.register_forward_pre_hook(linear(target[0]))
        elif path.endswith(".experts"):
            module.register_forward_pre_hook(experts(int(path.split(".")[2])))
    with torch.no_grad():
        for row in ids:
            model(row[None])
    return sums


@pytest.mark.usefixtures("in_float32")
@pytest.mark.parametrize("family", FAMILIES)
def test_every_entry_is_the_sum_over_the_inputs(family: str, tmp_path: Path) -> None:
    folder = tiny.make(tmp_path / "m", family, num_hidden_layers=2) if family != "gemma3" else tiny.make(
        tmp_path / "m", family)
    job = export_imatrix.make_export(decode.open_model(str(folder)), tmp_path, None, SAMPLES, LENGTH, "cpu")
    result = export_imatrix.run(job)
    expected = reference(folder, job.tokens.ids)
    reader = GGUFReader(tmp_path / "m-imatrix.gguf")
    stored = {tensor.name: tensor for tensor in reader.tensors}
    assert set(stored) == {f"{name}.{kind}" for name in expected for kind in ("in_sum2", "counts")}
    for name, (sums, tokens) in expected.items():
        assert stored[f"{name}.counts"].data.reshape(-1).tolist() == tokens
        torch.testing.assert_close(torch.tensor(stored[f"{name}.in_sum2"].data).double(), sums, rtol=2e-4, atol=1e-4)
    said = {key: reader.fields[f"imatrix.{key}"].contents() for key in ("datasets", "chunk_count", "chunk_size")}
    assert said == {"datasets": ["builtin"], "chunk_count": SAMPLES, "chunk_size": LENGTH}
    assert result["linears"] == len(job.linears) and result["calibration"]["sha256"] == job.tokens.sha256


def test_a_killed_run_goes_on_and_ends_in_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = decode.open_model(str(tiny.make(tmp_path / "m", "llama")))
    run_block, seen = importance.of_block, []

    def of_block(bones: Any, index: int, *rest: Any) -> Any:
        seen.append(index)
        if len(seen) == 3:
            raise SystemExit(9)
        return run_block(bones, index, *rest)

    monkeypatch.setattr(importance, "of_block", of_block)
    arguments = None, SAMPLES, LENGTH, "cpu"
    with pytest.raises(SystemExit):
        export_imatrix.run(export_imatrix.make_export(source, tmp_path / "a.gguf", *arguments))
    assert not (tmp_path / "a.gguf").exists()
    export_imatrix.run(export_imatrix.make_export(source, tmp_path / "a.gguf", *arguments))
    assert seen == [0, 1, 2, 2]
    export_imatrix.run(export_imatrix.make_export(source, tmp_path / "b.gguf", *arguments))
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gguf", "b.gguf", "m"]


def test_an_expert_without_tokens_counts_none(tmp_path: Path) -> None:
    folder = tiny.make(tmp_path / "m", "qwen3_moe", num_experts=8, num_experts_per_tok=1)
    job = export_imatrix.make_export(decode.open_model(str(folder)), tmp_path / "i.gguf", None, 1, 8, "cpu")
    export_imatrix.run(job)
    found = read_imatrix(tmp_path / "i.gguf")
    means, counts = found["blk.0.ffn_up_exps.weight"]
    assert counts.sum() == 8 and bool((counts == 0).any())
    assert bool((means[counts == 0] == 1).all())


def test_from_the_command_line_and_back_into_a_quantizer(run: Any, tmp_path: Path) -> None:  # noqa: F811
    model = tiny.make(tmp_path / "m", "llama", num_hidden_layers=1, hidden_size=256)
    text = tmp_path / "text.txt"
    text.write_text("\n".join(tiny.TEXT) * 9)
    words = ("export", model, "--to", "imatrix", "--calibration", text, "--samples", 4, "--sequence-length", 16)
    status, out, _ = run(*words, "--out", tmp_path / "i.gguf", "--json")
    result = json.loads(out)
    assert status == 0 and result["format"] == "imatrix" and result["calibration"]["source"] == "text.txt"
    to = ("export", model, "--to", "gguf", "--type", "q4_k_m", "--quiet")
    assert run(*to, "--imatrix", tmp_path / "i.gguf", "--out", tmp_path / "weighed.gguf")[0] == 0
    assert run(*to, "--out", tmp_path / "plain.gguf")[0] == 0
    assert (tmp_path / "weighed.gguf").read_bytes() != (tmp_path / "plain.gguf").read_bytes()
    other = tiny.make(tmp_path / "o", "olmo2", num_hidden_layers=1)
    for given, said in (
            ((*words, "--out", tmp_path / "i.gguf"), "i.gguf exists; remove it or choose another --out"),
            (("export", model, "--to", "gguf", "--samples", 3), "--samples is for --to imatrix or text, not gguf"),
            (("export", other, "--to", "imatrix", "--samples", 2), "model type 'olmo2' has no names in GGUF"),
            (("export", model, "--to", "imatrix", "--sequence-length", 2), "calibration.sequence_length"),
            (("quantize", model, "--method", "q4_k_m", "--imatrix", tmp_path / "i.gguf"),
             f"qtool export {model} --to gguf --type q4_k_m --imatrix {tmp_path / 'i.gguf'}")):
        status, _, err = run(*given)
        assert status == 2 and said in " ".join(err.split()), err
