"""The second decoders against formulas, on random codes: what qtool packs, and layouts that only others write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from qtool import formats, independent
from qtool.errors import CheckpointError
from qtool.independent import store
from qtool.recipe import Scheme
from tests.formats.cases import NAME, dense, random_tensor


def decoded(folder: Path, tensors: dict[str, torch.Tensor], quantization: dict[str, Any], format_: str) -> np.ndarray:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    reader = independent.linears(folder, quantization, format_)[NAME]
    assert not isinstance(reader, str)
    return reader()


@pytest.mark.parametrize(("format_", "bits", "group"), [
    *((name, bits, group) for name in ("compressed-tensors", "gptq") for bits in (2, 3, 4, 8) for group in (32, -1)),
    ("awq", 4, 32), ("awq", 4, -1), *(("mlx", bits, 32) for bits in (2, 3, 4, 5, 6, 8))])
@pytest.mark.parametrize("symmetric", [True, False])
def test_integers_of_every_width(format_: str, bits: int, symmetric: bool, group: int, tmp_path: Path) -> None:
    scheme, module = Scheme(bits=bits, group_size=group, symmetric=symmetric), formats.load(format_)
    tensor = random_tensor(64, 96, scheme, torch.float16 if format_ in ("gptq", "awq") else torch.bfloat16)
    packed = module.pack(NAME, tensor, torch.bfloat16)
    assert np.array_equal(decoded(tmp_path, packed, module.config({NAME: scheme}, []), format_), dense(tensor).numpy())


def test_three_bits_in_whole_words_and_zero_points_in_bytes(tmp_path: Path) -> None:
    """compressed-tensors up to 0.17."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 8, (6, 64), generator=generator)
    words = torch.zeros(6, 7, dtype=torch.int64)
    for column in range(64):
        words[:, column // 10] |= codes[:, column] << 3 * (column % 10)
    zeros = torch.randint(-4, 4, (6, 2), generator=generator).to(torch.int8)
    scale = torch.rand(6, 2, generator=generator)
    config = {"config_groups": {"group_0": {"targets": ["Linear"], "weights": {
        "num_bits": 3, "type": "int", "symmetric": False, "strategy": "group", "group_size": 32}}},
        "format": "pack-quantized", "ignore": ["lm_head"]}
    found = decoded(tmp_path, {f"{NAME}.weight_packed": words.to(torch.int32), f"{NAME}.weight_scale": scale,
                               f"{NAME}.weight_zero_point": zeros, f"{NAME}.weight_shape": torch.tensor([6, 64])},
                    config, "compressed-tensors")
    group = torch.arange(64) // 32
    wanted = (codes - 4 - zeros[:, group]).float() * scale[:, group]
    assert np.array_equal(found, wanted.numpy())


def test_columns_in_activation_order(tmp_path: Path) -> None:
    scheme = Scheme(bits=4, group_size=32)
    tensor = random_tensor(32, 64, scheme, torch.float16)
    packed = formats.load("gptq").pack(NAME, tensor)
    order = torch.randint(0, 2, (64,), dtype=torch.int32, generator=torch.Generator().manual_seed(1))
    packed[f"{NAME}.g_idx"] = order
    wanted = (tensor.codes.float() - 8) * tensor.scale.float()[:, order.long()]
    config = formats.load("gptq").config({NAME: scheme}, [])
    assert np.array_equal(decoded(tmp_path, packed, config, "gptq"), wanted.numpy())
    packed[f"{NAME}.g_idx"] = order + 1
    with pytest.raises(CheckpointError, match="g_idx"):
        decoded(tmp_path, packed, config, "gptq")


def test_the_small_floats_are_torchs() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    assert np.array_equal(store.e4m3(), codes.view(torch.float8_e4m3fn).float().numpy(), equal_nan=True)


@pytest.mark.parametrize(("change", "words"), [
    ({"ignore": [NAME]}, "says to ignore it"), ({"config_groups": {}}, "is a target of no config group"),
])
def test_a_config_that_denies_what_is_stored(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    scheme = Scheme(bits=4, group_size=32)
    save_file(formats.load("compressed-tensors").pack(NAME, random_tensor(32, 64, scheme, torch.bfloat16)),
              tmp_path / "model.safetensors")
    config = json.loads(json.dumps(formats.load("compressed-tensors").config({NAME: scheme}, []))) | change
    with pytest.raises(CheckpointError, match=words):
        independent.linears(tmp_path, config, "compressed-tensors")


@pytest.mark.parametrize(("block", "kind"), [("mlp", "up_proj"), ("block_sparse_moe", "w3")])
def test_stacked_experts_are_read_one_by_one(block: str, kind: str, tmp_path: Path) -> None:
    scheme, module = Scheme(bits=4, group_size=32), formats.load("mlx")
    names = [f"model.layers.0.{block}.experts.{number}.{kind}" for number in range(3)]
    tensors = [random_tensor(8, 64, scheme, torch.bfloat16, number) for number in range(3)]
    packed = [module.pack(name, tensor, torch.bfloat16) for name, tensor in zip(names, tensors, strict=True)]
    stacked = {f"model.layers.0.{block}.switch_mlp.up_proj.{part}":
               torch.stack([one[f"{name}.{part}"] for name, one in zip(names, packed, strict=True)])
               for part in module.SUFFIXES}
    save_file(stacked, tmp_path / "model.safetensors")
    readers = independent.linears(tmp_path, module.config(dict.fromkeys(names, scheme), []), "mlx")
    assert list(readers) == names
    for name, tensor in zip(names, tensors, strict=True):
        assert np.array_equal(readers[name](), dense(tensor).numpy())  # type: ignore[operator]
    amounts: list[int] = []
    real = np.fromfile
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(store.np, "fromfile",
                        lambda *given, **more: (amounts.append(given[2]), real(*given, **more))[1])
        for name in names:
            readers[name]()  # type: ignore[operator]
    assert sum(amounts) == sum(tensor.nbytes for tensor in stacked.values())  # nothing twice
    for shape in ((1 << 20, 0), (1 << 20, 0, 4)):
        save_file({"a.mlp.switch_mlp.up_proj.scales": torch.empty(shape)}, tmp_path / "model.safetensors")
        assert len(independent.linears(tmp_path, {"bits": 4, "group_size": 32}, "mlx")) == 1
