"""AQLM's layout: what is announced is written and comes back, also through aqlm's formula and the second decoder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from qtool import decode, export, formats, independent
from qtool.decode import Source
from qtool.errors import CheckpointError, InputError, NumericalError, PlanError
from qtool.formats import aqlm
from qtool.grids.aqlm import MEMBERS
from qtool.inspect import loaders
from qtool.recipe import Scheme
from qtool.tensors import QuantizedTensor
from tests import tiny
from tests.formats.cases import NAME, InMemory
from tests.test_pipeline import quantize

Q = f"{NAME}.codes"


def scheme_of(name: str) -> Scheme:
    return Scheme(grid=name, bits=MEMBERS[name].bits, group_size=8)


def random_tensor(name: str, rows: int, groups: int, dtype: torch.dtype, seed: int = 0) -> QuantizedTensor:
    """Codes anywhere in their range, both ends among them."""
    grid, generator = MEMBERS[name], torch.Generator().manual_seed(seed)
    codes = torch.randint(0, grid.words, (rows, groups, grid.books), generator=generator, dtype=torch.int32)
    codes[0, 0], codes[-1, -1] = 0, grid.words - 1
    books = torch.randn(grid.books, grid.words, 8, generator=generator).to(dtype)
    return grid.fitted(codes, books, (torch.rand(rows, 1, generator=generator) + 0.1).to(dtype))


def by_their_formula(packed: dict[str, torch.Tensor], bits: int) -> torch.Tensor:
    """aqlm's unpack_int_data and _dequantize_weight, float32 [N, K]."""
    codes, books = packed[Q].long() % (1 << bits), packed[f"{NAME}.codebooks"].float()
    picked = torch.stack([books[book][codes[..., book]] for book in range(len(books))]).sum(0)  # [N, G, 1, 8]
    return (picked * packed[f"{NAME}.scales"].float()).flatten(1)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.sampled_from(sorted(MEMBERS)), st.integers(1, 20), st.integers(1, 6),
       st.sampled_from([torch.bfloat16, torch.float16, torch.float32]), st.integers(0, 99))
def test_unpack_is_the_inverse_of_pack(name: str, rows: int, groups: int, dtype: torch.dtype, seed: int) -> None:
    grid, scheme, shape = MEMBERS[name], scheme_of(name), (rows, groups * 8)
    tensor = random_tensor(name, rows, groups, dtype, seed)
    assert aqlm.check(scheme, NAME, shape) is None and aqlm.scale_dtype(dtype) is dtype
    packed = aqlm.pack(NAME, tensor, dtype)
    specs = aqlm.layout(NAME, shape, scheme, dtype)
    assert {one.name: (one.dtype, one.shape) for one in specs} == {
        key: (value.dtype, tuple(value.shape)) for key, value in packed.items()}
    assert packed[Q].dtype is (torch.int16 if grid.code_bits > 8 else torch.int8)
    again = aqlm.unpack(NAME, packed.__getitem__, scheme, shape)
    assert torch.equal(again.codes, tensor.codes) and torch.equal(again.scale, tensor.scale)
    assert torch.equal(again.extra["codebooks"], tensor.extra["codebooks"])
    dense = grid.decode(tensor)
    assert torch.equal(aqlm.dequantize(NAME, packed.__getitem__, scheme, shape), dense)
    torch.testing.assert_close(by_their_formula(packed, grid.code_bits), dense, rtol=1e-5, atol=1e-5)

    config = {"quantization_config": aqlm.config({NAME: scheme}, ["model.layers.0.mlp.up_proj"])}
    assert formats.recognise(config) is aqlm
    assert aqlm.schemes(config, {one.name: one for one in specs}) == {NAME: (scheme, shape)}


@pytest.mark.parametrize("name", sorted(MEMBERS))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_second_decoder_agrees_bit_for_bit(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    tensor = random_tensor(name, 12, 5, dtype)
    save_file(aqlm.pack(NAME, tensor, dtype), tmp_path / "model.safetensors")
    reader = independent.linears(tmp_path, aqlm.config({NAME: scheme_of(name)}, []), "aqlm")[NAME]
    assert not isinstance(reader, str)
    assert np.array_equal(reader(), MEMBERS[name].decode(tensor).numpy())


def checkpoint(change: Callable[[dict[str, torch.Tensor], dict[str, Any]], object] | None = None) -> InMemory:
    said = aqlm.config({NAME: scheme_of("aqlm-2x8")}, [])
    tensors = aqlm.pack(NAME, random_tensor("aqlm-2x8", 16, 4, torch.bfloat16), torch.bfloat16)
    if change is not None:
        change(tensors, said)
    return InMemory(tensors, {"model_type": "llama", "torch_dtype": "bfloat16", "quantization_config": said})


def put(key: str, value: Any) -> Callable[[dict[str, torch.Tensor], dict[str, Any]], object]:
    return lambda tensors, said: said.__setitem__(key, value)


def turn(suffix: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    return lambda tensors, said: tensors.__setitem__(f"{NAME}.{suffix}", change(tensors[f"{NAME}.{suffix}"]))


@pytest.mark.parametrize(("change", "words"), [
    (put("nbits_per_codebook", 12), "2 codebooks of 12 bits"), (put("num_codebooks", True), "True codebooks"),
    (put("in_group_size", 16), "groups of 16 x 1"), (put("out_group_size", 4), "groups of 8 x 4"),
    (put("num_codebooks", [2]), r"\[2\] codebooks"), (put("num_codebooks", 3), r"not \[outputs, inputs / 8, 3\]"),
    (turn("codes", lambda one: one[..., :1]), r"not \[outputs, inputs / 8, 2\]"),
    (turn("codes", lambda one: one.flatten()), "not .outputs"),
    (turn("codes", lambda one: one.to(torch.int16)), r"codes: expected int8 \[16, 4, 2\], found int16"),
    (turn("codebooks", lambda one: one[:, :255]), r"codebooks: expected .*\[2, 256, 1, 8\], found .*255"),
    (turn("codebooks", lambda one: one.to(torch.int8)), "codebooks: expected"),
    (turn("scales", lambda one: one[:, 0]), r"scales: expected .*\[16, 1, 1, 1\]"),
    (lambda tensors, said: tensors.pop(f"{NAME}.scales"), "scales is missing"),
    (lambda tensors, said: tensors.pop(Q), r"no tensor is called \*.codes"),
])
def test_a_file_that_contradicts_itself_is_refused(change: Any, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        Source(checkpoint(change)).read(f"{NAME}.weight")  # type: ignore[arg-type]


def test_a_code_beyond_the_codewords_cannot_be_meant() -> None:
    """Every int8 is one of 256 codes, so what is stored decodes whatever it is; in memory an error tells."""
    source = Source(checkpoint(turn("codes", lambda one: one.fill_(-128))))  # type: ignore[arg-type]
    assert int(source.read_quantized(NAME).codes.unique()) == 128
    tensor = random_tensor("aqlm-2x8", 4, 2, torch.bfloat16)
    tensor.codes[1, 1, 1] = 256
    with pytest.raises(ValueError, match="256 codewords"):
        MEMBERS["aqlm-2x8"].decode(tensor)


def test_what_is_not_finite_is_not_written() -> None:
    tensor = random_tensor("aqlm-2x8", 4, 2, torch.float16)
    tensor.extra["codebooks"][1, 3, 2] = float("inf")
    with pytest.raises(NumericalError, match=NAME.replace(".", r"\.")):
        aqlm.pack(NAME, tensor)


def test_the_config_names_what_is_left() -> None:
    said = aqlm.config({NAME: scheme_of("aqlm-1x16")}, ["model.layers.0.mlp.up_proj", "lm_head"])
    assert said == {"quant_method": "aqlm", "in_group_size": 8, "out_group_size": 1, "num_codebooks": 1,
                    "nbits_per_codebook": 16, "linear_weights_not_to_quantize": [
                        "model.layers.0.mlp.up_proj", "lm_head", "model.layers.0.mlp.up_proj.weight", "lm_head.weight"]}
    mixed = {"a": scheme_of("aqlm-1x16"), "b": scheme_of("aqlm-2x8")}
    with pytest.raises(PlanError, match="codebooks of one kind, but a has aqlm-1x16 and b has aqlm-2x8"):
        aqlm.config(mixed, [])
    assert "1 MiB" in aqlm.notes(mixed)[1] and len(aqlm.notes({"b": scheme_of("aqlm-2x8")})) == 1
    assert "--method aqlm" in str(aqlm.check(Scheme(), NAME, (8, 8)))
    assert "do not divide the 12 inputs" in str(aqlm.check(scheme_of("aqlm-2x8"), NAME, (8, 12)))


def test_no_other_format_holds_codebooks() -> None:
    for name in set(formats.names()) - {"aqlm", "hf"}:
        reason = formats.load(name).check(scheme_of("aqlm-2x8"), NAME, (64, 128))
        assert reason and "aqlm-2x8" in reason and NAME in reason, name


def test_an_export_that_is_not_lossless_says_so(tmp_path: Path) -> None:
    model = tiny.make(tmp_path / "model", "llama", num_hidden_layers=1)
    quantize(model, tmp_path / "out", "aqlm", scheme__group_size=8, steps__aqlm__rounds=1)
    source = decode.open_model(str(tmp_path / "out"))
    assert [(one["loader"], one["problems"]) for one in loaders.check(source)] == [("transformers", [])]
    with pytest.raises(InputError, match=r"does not hold the aqlm-2x8.*--format aqlm.*--requantize"):
        export.make_export(source, "compressed-tensors", tmp_path / "e")
    export.run(export.make_export(source, "hf", tmp_path / "dense"))
    dense = decode.open_model(str(tmp_path / "dense"))
    assert all(torch.equal(dense.read(f"{name}.weight"), source.read(f"{name}.weight")) for name in source.schemes)
