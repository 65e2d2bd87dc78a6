"""Tensors of experts that lie in files as one: written and read part by part, wherever files begin and end."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from qtool.checkpoint import stacks
from qtool.checkpoint.reader import open_directory
from qtool.checkpoint.writer import INDEX, ShardWriter, plan_shards
from qtool.errors import CheckpointError, PlanError
from qtool.tensors import TensorSpec

DTYPES = (torch.uint32, torch.bfloat16, torch.float32, torch.uint8)


def members(spec: TensorSpec) -> list[str]:
    """Of "stack3.w": "experts.0.stack3.w", "experts.1.stack3.w" ..."""
    return [f"experts.{number}.{spec.name}" for number in range(spec.shape[0])] if "stack" in spec.name else []


@st.composite
def models(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    """Tensors by the names that files have."""
    found = {}
    for number in range(draw(st.integers(1, 5))):
        shape = (draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 3)))
        name = draw(st.sampled_from(("stack", "plain"))) + f"{number}.w"
        found[name] = torch.randint(0, 200, shape).to(draw(st.sampled_from(DTYPES)))
    return found


def specs_of(tensors: dict[str, torch.Tensor]) -> list[TensorSpec]:
    return [part for name, tensor in tensors.items()
            for part in stacks.parts(TensorSpec(name, tensor.dtype, tuple(tensor.shape)), members)]


def part_of(tensors: dict[str, torch.Tensor], spec: TensorSpec) -> torch.Tensor:
    return tensors[spec.stored] if spec.stack is None else tensors[spec.stored][spec.stack[1]]


@settings(max_examples=60, deadline=None)
@given(tensors=models(), limit=st.integers(1, 200), order=st.randoms(use_true_random=False))
def test_parts_in_any_order_make_whole_tensors(tmp_path_factory: pytest.TempPathFactory, limit: int,
                                               order: random.Random, tensors: dict[str, torch.Tensor]) -> None:
    folder, specs = tmp_path_factory.mktemp("stacks"), specs_of(tensors)
    order.shuffle(specs)
    writer = ShardWriter(folder, plan_shards(specs, limit))
    order.shuffle(specs)
    for spec in specs:
        writer.write(spec.name, part_of(tensors, spec))
        assert torch.equal(writer.read_back(spec.name), part_of(tensors, spec))
    writer.finish()
    files = sorted(folder.glob("*.safetensors"))
    there = {name: tensor for path in files for name, tensor in load_file(path).items()}  # by another program
    assert there.keys() == tensors.keys() and all(torch.equal(there[name], tensors[name]) for name in tensors)
    if len(files) > 1:
        assert json.loads((folder / INDEX).read_text())["weight_map"].keys() == tensors.keys()

    (folder / "config.json").write_text("{}")
    whole = open_directory(folder)
    seen = stacks.unstacked(whole, members)
    assert list(seen.specs.values()) == sorted(specs, key=lambda spec: spec.name) and seen.hashes() == whole.hashes()
    for spec in specs:
        assert torch.equal(seen.read(spec.name), part_of(tensors, spec))
        assert torch.equal(seen.read_rows(spec.name, 1, spec.shape[0]), part_of(tensors, spec)[1:])


def part(number: int, rows: int = 2) -> TensorSpec:
    return TensorSpec(f"experts.{number}.w", torch.uint8, (rows, 4), ("w", number))


@pytest.mark.parametrize(("specs", "message"), [
    ([part(0), part(2)], r"'w' would hold the experts \[0, 2\]"), ([part(1)], "all experts of a layer one scheme"),
    ([part(0), part(0)], "some twice"), ([part(0), part(1, 3)], "several types or shapes"),
])
def test_a_stack_that_is_not_whole_is_refused(specs: list[TensorSpec], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        plan_shards(specs, 100)


def test_an_expert_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, plan_shards([TensorSpec("experts.0.w", torch.uint8, (1,))], 100))
    writer.finish()
    (tmp_path / "config.json").write_text("{}")
    whole = open_directory(tmp_path)
    whole.specs["stack.w"] = TensorSpec("stack.w", torch.uint8, (1, 2))
    with pytest.raises(CheckpointError, match=r"'experts.0.w' is there twice, in 'experts.0.w' and in 'stack.w'"):
        stacks.unstacked(whole, lambda spec: ["experts.0.w"] if spec.name == "stack.w" else [])


def test_parts_without_data_or_without_end_are_not_believed(tmp_path: Path) -> None:
    """A header may claim any number of empty tensors."""
    assert stacks.parts(TensorSpec("stack.w", torch.uint8, (4096, 0, 4)), members) == [
        TensorSpec("stack.w", torch.uint8, (4096, 0, 4))]
    ShardWriter(tmp_path, plan_shards([TensorSpec("a", torch.uint8, (1,))], 100)).finish()
    (tmp_path / "config.json").write_text("{}")
    whole = open_directory(tmp_path)
    whole.specs |= {f"stack{number}.w": TensorSpec(f"stack{number}.w", torch.uint8, (4096, 1)) for number in range(200)}
    with pytest.raises(CheckpointError, match="more than any model has"):
        stacks.unstacked(whole, members)
