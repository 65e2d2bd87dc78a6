"""Codes and scales between GGUF's plain block types and the formats of integers: the same values, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtool import decode, export, export_gguf, found
from qtool.checkpoint.gguf_families import gguf_name, written_as
from qtool.errors import InputError
from qtool.formats import gguf as blocks
from qtool.recipe import Scheme
from qtool.tensors import QuantizedTensor
from tests import tiny
from tests.loaders.checkpoints import Case, build

FAMILY = "qwen3"  # llama.cpp keeps the order of its rows
PAIRS = [  # type, the format and scheme that it takes over
    ("q4_0", "gptq", Scheme(bits=4, group_size=32)), ("q4_0", "compressed-tensors", Scheme(bits=4, group_size=64)),
    ("q4_0", "awq", Scheme(bits=4, group_size=-1)), ("q4_0", "mlx", Scheme(bits=3, group_size=32)),
    ("q8_0", "compressed-tensors", Scheme(bits=8, group_size=32)), ("q8_0", "gptq", Scheme(bits=4, group_size=128)),
    ("q5_0", "mlx", Scheme(bits=5, group_size=64)), ("q4_1", "gptq", Scheme(bits=4, group_size=32)),
    ("q5_1", "mlx", Scheme(bits=5, group_size=32)),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float16 model, whose scales are float16."""
    folder = tmp_path_factory.mktemp("codes")
    tiny.make(folder / "model", FAMILY, hidden_size=128, intermediate_size=256, num_hidden_layers=1, head_dim=64,
              num_attention_heads=2)
    tiny.in_float16(folder / "model")
    return folder


def exported(source: decode.Source, kind: str, out: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What the export says; the matrices by their Hugging Face names as the gguf package decodes them."""
    result = export_gguf.run(export_gguf.make_export(source, kind, out))
    stored = {one.name: torch.from_numpy(gguf.dequantize(one.data, one.tensor_type))
              for one in gguf.GGUFReader(out).tensors if len(one.shape) == 2}
    family = written_as(source.config["model_type"])
    assert family is not None
    names = {name: gguf_name(name, family) for name in source.specs}
    return result, {name: stored[target[0]] for name, target in names.items() if target and target[0] in stored}


@pytest.mark.parametrize(("kind", "format_name", "scheme"), PAIRS, ids=lambda one: str(getattr(one, "label", one)))
def test_codes_and_scales_go_over(kind: str, format_name: str, scheme: Scheme, folder: Path, tmp_path: Path) -> None:
    source = decode.open_model(str(build(Case(tmp_path.name, format_name, scheme), tmp_path, folder / "model")))
    result, values = exported(source, kind, tmp_path / "m.gguf")
    assert result["lossless"] and "bit for bit" in result["checked"] and len(source.schemes) == 7
    assert all(torch.equal(values[f"{linear}.weight"], source.decoded(linear)) for linear in source.schemes)
    note, = result["notes"]
    assert note.startswith("2 tensors that were not quantized are rounded now") and f"to {kind.upper()}" in note


def test_what_a_type_cannot_hold_is_rounded_and_said(folder: Path, tmp_path: Path) -> None:
    """Zero points times scales need more digits than float16 has; 8 bits do not fit into 4."""
    scheme = Scheme(bits=4, group_size=32, symmetric=False)
    source = decode.open_model(str(build(Case("zeros", "gptq", scheme), tmp_path, folder / "model")))
    result, values = exported(source, "q4_1", tmp_path / "zeros.gguf")
    assert not result["lossless"] and "7 of 7 quantized linears are decoded and rounded again" in result["notes"][0]
    linear = next(iter(source.schemes))
    assert 0 < float((values[f"{linear}.weight"] - source.decoded(linear)).abs().max()) < 0.01
    wide = decode.open_model(str(build(Case("w8", "gptq", Scheme(bits=8, group_size=32)), tmp_path, folder / "model")))
    assert not exported(wide, "q4_0", tmp_path / "w8.gguf")[0]["lossless"]
    dense, _ = exported(decode.open_model(str(folder / "model")), "q4_0", tmp_path / "dense.gguf")
    assert not dense["lossless"] and dense["notes"] == []


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_what_is_held_is_what_was_meant(data: st.DataObject) -> None:
    """Any affine tensor: the blocks decode to exactly its values, or the type says that it cannot hold them."""
    bits, per = data.draw(st.integers(2, 8)), data.draw(st.sampled_from((1, 2, 4)))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1 << 30)))
    codes = torch.randint(0, 1 << bits, (3, 128), generator=generator, dtype=torch.uint8)
    groups = 4 // per
    scale = torch.randn(3, groups, generator=generator) * data.draw(st.sampled_from((1e-6, 1e-3, 1.0, 1e5)))
    if data.draw(st.booleans()):
        scale = scale.to(torch.float16)
    symmetric = data.draw(st.booleans())
    zero = torch.full((3, groups), 1 << (bits - 1)) if symmetric else torch.randint(0, 1 << bits, (3, groups),
                                                                                    generator=generator)
    tensor = QuantizedTensor(codes, scale, zero.to(torch.uint8), bits, 32 * per, symmetric)
    grid = found.load("grids", data.draw(st.sampled_from(("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q4_k", "iq4_nl"))))
    held = grid.holding(tensor)
    exact = scale.dtype == torch.float16 and bool(scale.isfinite().all())
    if held is None:
        fits = symmetric and exact and bits <= grid.bits and not grid.mins
        assert not fits or grid.name in ("q4_k", "iq4_nl")
        return
    packed = blocks.pack("x", held)["x.weight"]
    kind = gguf.GGMLQuantizationType[grid.name.upper()]
    assert torch.equal(torch.from_numpy(gguf.dequantize(packed.numpy(), kind)),
                       found.load("grids", "affine").decode(tensor))


@pytest.mark.parametrize(("kind", "to"), [("q4_0", "gptq"), ("q4_0", "compressed-tensors"), ("q4_0", "awq"),
                                          ("q8_0", "gptq"), ("q8_0", "mlx"), ("q5_0", "mlx")])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_file_of_plain_blocks_becomes_integers(family: str, kind: str, to: str, tmp_path: Path) -> None:
    """llama's rows are in another order in the file."""
    model = tiny.make(tmp_path / "model", family, num_hidden_layers=1)
    _, values = exported(decode.open_model(str(model)), kind, tmp_path / "m.gguf")
    source = decode.open_model(str(tmp_path / "m.gguf"))
    exact = decode.open_model(str(tmp_path / "m.gguf"), gguf_dtype=torch.float32)
    job = export.make_export(source, to, tmp_path / "out")
    assert "decoded to float16: " in job.lost[0] and "model.embed_tokens.weight" in job.lost[0]
    result = export.run(job)
    assert result["lossless"] and result["linears"] == 7
    back = decode.open_model(str(tmp_path / "out"))
    assert {scheme.label for scheme in back.schemes.values()} == {f"int{kind[1]}-g32"} and len(back.schemes) == 7
    for linear in back.schemes:
        assert torch.equal(back.decoded(linear), exact.read(f"{linear}.weight"))
        if family == "qwen3" or "self_attn" not in linear:
            assert torch.equal(back.decoded(linear), values[f"{linear}.weight"])
    again, _ = exported(back, kind, tmp_path / "again.gguf")
    assert again["lossless"]
    first, second = ({one.name: one.data for one in gguf.GGUFReader(tmp_path / name).tensors if "blk" in one.name}
                     for name in ("m.gguf", "again.gguf"))
    assert all((first[name] == second[name]).all() for name in first)


def test_scales_of_scales_go_nowhere(tmp_path: Path) -> None:
    model = tiny.make(tmp_path / "model", "llama", num_hidden_layers=1, hidden_size=256)
    exported(decode.open_model(str(model)), "q4_k_m", tmp_path / "m.gguf")
    with pytest.raises(InputError, match=r"is q\d_k, whose scales no other format holds; --to hf"):
        export.make_export(decode.open_model(str(tmp_path / "m.gguf")), "gptq", tmp_path / "out")
    exported(decode.open_model(str(model)), "q4_1", tmp_path / "n.gguf")
    with pytest.raises(InputError, match="minima are no multiples of its scales"):
        export.make_export(decode.open_model(str(tmp_path / "n.gguf")), "gptq", tmp_path / "out")
