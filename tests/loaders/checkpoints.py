"""Checkpoints for the loaders, written with our formats, and what they ought to compute."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qtool import decode, formats, found
from qtool.checkpoint import open_checkpoint
from qtool.checkpoint.writer import ShardWriter, plan_shards
from qtool.models.inputs import multiply_codes, round_inputs
from qtool.models.kv import round_cache
from qtool.recipe import Rule, Scheme
from qtool.tensors import INPUT_SCALE
from tests import tiny

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
IDS = [index * 37 % 480 for index in range(24)]
LLAMA = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 32}
SKIP = Rule(match="lm_head", skip=True)


@dataclass(frozen=True)
class Case:
    """One checkpoint: its format, the scheme of its linears, and the exceptions. stretch: of the scales, so that codes
    leave a part of their range unused."""

    name: str
    format: str
    scheme: Scheme
    rules: tuple[Rule, ...] = ()
    family: str = "llama"
    stretch: float = 1.0

    def __str__(self) -> str:
        return self.name

    def scheme_for(self, linear: str) -> Scheme | None:
        rule = next((rule for rule in (*self.rules, SKIP) if rule.matches(linear)), None)
        if rule is None:
            return self.scheme
        return None if rule.skip else rule.apply(self.scheme)


def case(format_name: str, bits: int, group: int, symmetric: bool = True, *rules: Rule, name: str = "",
         family: str = "llama") -> Case:
    scheme = Scheme(bits=bits, group_size=group, symmetric=symmetric)
    return Case(name or scheme.label, format_name, scheme, rules, family)


def build(one: Case, folder: Path, source: Path | None = None) -> Path:
    """Round every linear of a source (a tiny random model unless one is given) and write it as the case says.

    Half of the scales of a symmetric case are negative: the longer side of the grid goes where the larger weight is.
    """
    if source is None:
        source = folder / f"source-{one.family}"
        if not source.exists():
            tiny.make(source, one.family, **(LLAMA if one.family == "llama" else {}))
    checkpoint, module = open_checkpoint(str(source)), formats.load(one.format)
    model_dtype = decode.model_dtype(checkpoint.config, checkpoint.specs)
    schemes, skipped, specs = {}, [], []
    for name, spec in checkpoint.specs.items():
        linear = name.removesuffix(".weight")
        inside = linear != name and ".layers." in name and len(spec.shape) == 2 or linear == "lm_head"
        scheme = one.scheme_for(linear) if inside else None
        if scheme is not None:
            assert module.check(scheme, linear, spec.shape) is None
            schemes[linear] = scheme
            specs += module.layout(linear, spec.shape, scheme, model_dtype)
        else:
            skipped += [linear] if inside else []
            specs.append(spec)
    specs = list(map(formats.placing(module, schemes), specs))
    out = folder / one.name
    out.mkdir()
    writer = ShardWriter(out, plan_shards(specs, 1 << 40), getattr(module, "METADATA", None))
    for name in checkpoint.specs:
        _write(writer, checkpoint.read(name), name, schemes.get(name.removesuffix(".weight")), module, model_dtype,
               one.stretch)
    writer.finish()
    for path in checkpoint.companions():
        shutil.copyfile(path, out / path.name)
    said = module.config(schemes, skipped, ["rtn"])
    config = formats.with_quantization(checkpoint.config, module, said)
    for name, content in {"config.json": config, **module.extra_files(said)}.items():
        (out / name).write_text(json.dumps(content, indent=1))
    return out


def _write(writer: ShardWriter, tensor: torch.Tensor, name: str, scheme: Scheme | None, module: Any,
           model_dtype: torch.dtype, stretch: float) -> None:
    packed = {name: tensor}
    if scheme is not None:
        grid = found.load("grids", scheme.grid)
        fitted = grid.fit(tensor.float(), scheme, module.scale_dtype(model_dtype), signed=True)
        fitted = replace(fitted, scale=fitted.scale * stretch)
        negative = scheme.grid == "affine" and scheme.symmetric
        assert not negative or bool((fitted.scale < 0).any()), "negative scales are part of the test"
        if scheme.activations == "tensor":  # such that some inputs are cut off
            fitted = replace(fitted, extra={INPUT_SCALE: torch.tensor([0.01], dtype=model_dtype)})
        packed = module.pack(name.removesuffix(".weight"), grid.encode(tensor.float(), fitted), model_dtype)
    for key, value in packed.items():
        writer.write(key, value)


def dense(model: Path, folder: Path, exact: bool = True) -> Path:
    """A float32 checkpoint of what we decode; exact: without the rounding to the dtype of the model."""
    source = decode.open_model(str(model))
    tensors = {name: source.read(name).float() for name in source.specs}
    if exact:
        tensors |= {f"{name}.weight": found.load("grids", scheme.grid).decode(source.read_quantized(name))
                    for name, scheme in source.schemes.items()}
    out = folder / f"{model.name}-dense{'' if exact else '-rounded'}"
    out.mkdir()
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    (out / "config.json").write_text(json.dumps({**source.config, "dtype": "float32"}))
    return out


def expected(model: Path, folder: Path, exact: bool = True, dtype: torch.dtype = torch.float32,
             rounded: bool = True, ids: Sequence[int] = IDS) -> torch.Tensor:
    """Logits float32 [len(ids), vocabulary] of our decoded weights, computed in `dtype`; rounded: inputs as well."""
    network = decoded(model, folder, exact, dtype, rounded)
    with torch.no_grad():
        return network(torch.tensor([ids])).logits[0].float()


def greedy(model: Path, folder: Path, prompt: Sequence[int], count: int) -> tuple[list[int], list[float]]:
    """The tokens that our decoded weights continue a prompt with in float32, and by how much each beats the next."""
    network, ids, lead = decoded(model, folder), list(prompt), []
    for _ in range(count):
        with torch.no_grad():
            best = network(torch.tensor([ids]), use_cache=False).logits[0, -1].topk(2)
        ids.append(int(best.indices[0]))
        lead.append(float(best.values[0] - best.values[1]))
    return ids[len(prompt):], lead


def decoded(model: Path, folder: Path, exact: bool = True, dtype: torch.dtype = torch.float32,
            rounded: bool = True) -> torch.nn.Module:
    """transformers' module with our decoded weights; it rounds its inputs, keys and values as the checkpoint says."""
    from transformers import AutoModelForCausalLM

    path = dense(model, folder, exact)
    network: torch.nn.Module = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    shutil.rmtree(path)
    source = decode.open_model(str(model))
    if rounded:
        round_inputs(network, source.schemes, lambda name: source.read_quantized(name).extra[INPUT_SCALE])
    multiply_codes(network, source.schemes, source.read_quantized)
    round_cache(network, source.cache_scales())
    return network


def read(venv: str, script: str, jobs: list[dict[str, Any]], folder: Path) -> None:
    """Let another program open checkpoints in its virtual environment ('': ours); a job names its answer's file."""
    python = ROOT / venv / "bin" / "python" if venv else Path(sys.executable)
    if not python.exists():
        pytest.skip(f"{venv} is not there; 'make test-loaders' makes it")
    path = folder / f"{script}{venv}.json"
    path.write_text(json.dumps([{"ids": IDS, **job} for job in jobs]))
    done = subprocess.run([python, HERE / script, path], capture_output=True, text=True, timeout=500, cwd=folder)
    assert done.returncode == 0, f"{script} in {venv}:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"


def assert_close(theirs: torch.Tensor, ours: torch.Tensor, limit: float) -> None:
    """The largest difference of a logit is below `limit`; `pytest -rP` shows it."""
    difference = float((theirs - ours).abs().max())
    print(f"largest difference {difference:.2e}, logits of size {float(ours.std()):.2f}")
    assert difference < limit


def answer(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors and the remarks that a reader wrote."""
    with safe_open(path, "pt") as file:
        remarks = file.metadata() or {}
    return load_file(path), remarks
