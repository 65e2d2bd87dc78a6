"""Checkpoints as other programs write them, packed here in plain numpy, with their quirks: read as dense weights.

GPTQ in both conventions and MLX have more in test_decode.py and test_mlx.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qtool import decode
from qtool.errors import CheckpointError
from qtool.recipe import Scheme
from qtool.tensors import INPUT_SCALE
from tests.formats.cases import NAME, InMemory

ROWS, COLUMNS, GROUP = 32, 128, 32
RANDOM = np.random.default_rng(0)
AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # the nibble of column 8 w + j


def words(codes: np.ndarray, bits: int, places: tuple[int, ...] | None = None) -> torch.Tensor:
    """Codes [any, n] -> int32 [any, n bits / 32], a little-endian stream along the rows; bit by bit."""
    if places is not None:
        codes = codes.reshape(len(codes), -1, 8)[:, :, np.argsort(places)].reshape(len(codes), -1)
    lines = (codes[:, :, None] >> np.arange(bits)) & 1
    packed = np.packbits(lines.reshape(len(codes), -1).astype(np.uint8), axis=1, bitorder="little")
    return torch.from_numpy(np.ascontiguousarray(packed).view(np.int32))


def integers(bits: int, groups: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes [N, K], zero points 1 .. top [N, G] and scales [N, G]."""
    codes = RANDOM.integers(0, 1 << bits, (ROWS, COLUMNS))
    zeros = RANDOM.integers(1, 1 << bits, (ROWS, groups))
    return codes, zeros, (RANDOM.random((ROWS, groups)) * 0.1 + 0.01).astype(np.float16)


def weight_of(codes: np.ndarray, zeros: np.ndarray, scale: np.ndarray, index: np.ndarray) -> np.ndarray:
    return (codes - zeros[:, index]).astype(np.float32) * scale.astype(np.float32)[:, index]


def opened(tensors: dict[str, Any], said: dict[str, Any] | None, folder: Path = Path("nowhere")) -> decode.Source:
    named = {f"{NAME}.{key}": value if isinstance(value, torch.Tensor) else torch.from_numpy(np.array(value, order="C"))
             for key, value in tensors.items()}
    config = {"model_type": "llama", "torch_dtype": "float16"}
    return decode.Source(InMemory(named, config if said is None else {**config, "quantization_config": said}, folder))


@pytest.mark.parametrize("kind", ["plain", "no g_idx", "g_idx", "negative g_idx"])
@pytest.mark.parametrize("form", ["gptq", "gptq_v2", None])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq(bits: int, form: str | None, kind: str) -> None:
    codes, zeros, scale = integers(bits, 4)
    index = np.arange(COLUMNS) // GROUP
    index = RANDOM.permutation(index) if "g_idx" in kind and not kind.startswith("no") else index
    stored = index - 4 * (index == 2) if kind.startswith("negative") else index
    tensors = {"qweight": words(codes, bits).numpy().T, "scales": scale.T,
               "qzeros": words((zeros - (form != "gptq_v2")).T, bits), "g_idx": stored.astype(np.int32)}
    if kind == "no g_idx":
        del tensors["g_idx"]
    said = {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "sym": False, "made_with": "other"}
    source = opened(tensors, said | ({"checkpoint_format": form} if form else {}))
    assert np.array_equal(source.decoded(NAME).numpy(), weight_of(codes, zeros, scale, index))
    assert (source.obstacle(NAME) is not None) == (kind in ("g_idx", "negative g_idx"))
    assert source.schemes[NAME].label == f"uint{bits}-g{GROUP}" and source.weight_bytes() > 0


def test_gptq_that_calls_itself_symmetric_but_is_not() -> None:
    codes, zeros, scale = integers(4, 4)
    tensors = {"qweight": words(codes, 4).numpy().T, "scales": scale.T, "qzeros": words((zeros - 1).T, 4)}
    source = opened(tensors, {"quant_method": "gptq", "bits": 4, "group_size": GROUP})
    assert np.array_equal(source.decoded(NAME).numpy(), weight_of(codes, zeros, scale, np.arange(COLUMNS) // GROUP))
    assert "zero points are not" in str(source.obstacle(NAME))


@pytest.mark.parametrize("version", ["gemm", "GEMM", "gemv", None])
@pytest.mark.parametrize("group", [GROUP, -1])
def test_awq(version: str | None, group: int, tmp_path: Path) -> None:
    groups = COLUMNS // group if group > 0 else 1
    codes, zeros, scale = integers(4, groups)
    if version == "gemv":
        pad = 8 * -(-groups // 8) - groups
        tensors = {"qweight": words(codes, 4), "qzeros": words(np.pad(zeros, ((0, 0), (0, pad))), 4),
                   "scales": np.pad(scale, ((0, 0), (0, pad)))}
    else:
        tensors = {"qweight": words(codes.T, 4, AWQ_PLACES), "qzeros": words(zeros.T, 4, AWQ_PLACES), "scales": scale.T}
    said: dict[str, Any] = {"w_bit": 4, "q_group_size": group, "zero_point": True}
    said |= {"version": version} if version else {}
    (tmp_path / "quant_config.json").write_text(json.dumps(said))  # as old versions did
    index = np.arange(COLUMNS) // (COLUMNS // groups)
    for source in (opened(tensors, {"quant_method": "awq", **said}), opened(tensors, None, tmp_path)):
        assert np.array_equal(source.decoded(NAME).numpy(), weight_of(codes, zeros, scale, index))
        assert source.schemes[NAME] == Scheme(bits=4, group_size=group, symmetric=False)


def compressed(weights: dict[str, Any], form: str, inputs: Any = None, **more: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"dynamic": False, **weights}, "input_activations": inputs}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group},
            "ignore": ["lm_head"], "version": "0.9", "sparsity_config": {}, **more}


@pytest.mark.parametrize("zeros_are", ["packed", "unpacked", "with g_idx"])
@pytest.mark.parametrize("bits", [4, 8])
def test_compressed_tensors_pack_quantized(bits: int, zeros_are: str) -> None:
    codes, zeros, scale = integers(bits, 4)
    index = np.arange(COLUMNS) // GROUP
    packed: Any = np.ascontiguousarray(words(zeros.T, bits).numpy().T)
    tensors = {"weight_packed": words(codes, bits), "weight_scale": scale, "weight_shape": np.array([ROWS, COLUMNS]),
               "weight_zero_point": packed}
    if zeros_are == "unpacked":
        tensors["weight_zero_point"] = (zeros - (1 << bits - 1)).astype(np.int8)
    if zeros_are == "with g_idx":
        index = RANDOM.permutation(index)
        tensors["weight_g_idx"] = index.astype(np.int32)
    source = opened(tensors, compressed({"num_bits": bits, "type": "int", "symmetric": False, "strategy": "group",
                                         "group_size": GROUP, "actorder": "group"}, "pack-quantized"))
    assert np.array_equal(source.decoded(NAME).numpy(), weight_of(codes, zeros, scale, index))
    assert (source.obstacle(NAME) is None) == (zeros_are != "with g_idx")


@pytest.mark.parametrize("form", ["int-quantized", "naive-quantized"])
@pytest.mark.parametrize("strategy", ["channel", "group", "tensor"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("inputs", [None, {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token",
                                           "dynamic": True}])
def test_compressed_tensors_int_quantized(form: str, strategy: str, symmetric: bool, inputs: Any) -> None:
    groups = 4 if strategy == "group" else 1
    codes, zeros, scale = integers(8, groups)
    if strategy == "tensor":
        zeros, scale = (np.broadcast_to(one[:1], one.shape) for one in (zeros, scale))
    zeros = np.full_like(zeros, 128) if symmetric else zeros
    shared = slice(1) if strategy == "tensor" else slice(None)
    tensors = {"weight": (codes - 128).astype(np.int8), "weight_scale": scale[shared]}
    if not symmetric:
        tensors["weight_zero_point"] = (zeros[shared] - 128).astype(np.int8)
    source = opened(tensors, compressed({"num_bits": 8, "type": "int", "symmetric": symmetric, "strategy": strategy,
                                         "group_size": GROUP if groups > 1 else None}, form, inputs))
    index = np.arange(COLUMNS) // (COLUMNS // groups)
    assert np.array_equal(source.decoded(NAME).numpy(), weight_of(codes, zeros, scale, index))
    assert np.array_equal(source.read_quantized(NAME).codes.numpy(), codes)


def e4m3(rows: int, columns: int) -> torch.Tensor:
    return torch.from_numpy(RANDOM.standard_normal((rows, columns)).astype(np.float32)).to(torch.float8_e4m3fn)


@pytest.mark.parametrize(("rows", "columns"), [(256, 128), (192, 200), (40, 300)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_in_blocks_also_where_the_last_are_cut_off(rows: int, columns: int, dtype: torch.dtype) -> None:
    weight = e4m3(rows, columns)
    scale = torch.rand(-(-rows // 128), -(-columns // 128)).to(dtype)
    source = opened({"weight": weight, "weight_scale_inv": scale},
                    {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]})
    expected = weight.float()
    for row in range(rows):
        for block in range(scale.shape[1]):
            expected[row, 128 * block:128 * block + 128] *= scale[row // 128, block].float()
    assert torch.equal(source.decoded(NAME), expected)
    assert (source.obstacle(NAME) is None) == (rows == 256)


@pytest.mark.parametrize("name", ["weight_scale", "weight_scale_inv"])
@pytest.mark.parametrize("shape", [(), (1,), (ROWS,), (ROWS, 1)])
@pytest.mark.parametrize("static", [None, "input_scale", "activation_scale"])
def test_fp8_per_matrix_or_channel(name: str, shape: tuple[int, ...], static: str | None) -> None:
    weight, scale = e4m3(ROWS, COLUMNS), torch.rand(shape) + 0.1
    tensors = {"weight": weight, name: scale, **({static: torch.tensor(0.25)} if static else {})}
    source = opened(tensors, {"quant_method": "fp8", "activation_scheme": "static" if static else "dynamic"})
    assert torch.equal(source.decoded(NAME), weight.float() * scale.reshape(-1, 1))
    assert source.schemes[NAME].activations == ("tensor" if static else "token")
    tensor = source.read_quantized(NAME)
    assert (float(tensor.extra[INPUT_SCALE]) == 0.25) if static else not tensor.extra
    assert list(source.specs) == [f"{NAME}.weight"]


@pytest.mark.parametrize(("change", "message"), [
    (lambda t: t.pop("input_scale"), "none of input_scale"),
    (lambda t: t.update(weight_scale=torch.rand(7)), "neither one for the matrix"),
    (lambda t: t.update(weight=torch.rand(ROWS, COLUMNS)), "no float8_e4m3fn matrix"),
    (lambda t: t.pop("weight_scale"), "no tensor is called"),
])
def test_fp8_that_is_incomplete(change: Any, message: str) -> None:
    tensors = {"weight": e4m3(ROWS, COLUMNS), "weight_scale": torch.rand(1), "input_scale": torch.rand(1)}
    change(tensors)
    with pytest.raises(CheckpointError, match=message):
        opened(tensors, {"quant_method": "fp8", "activation_scheme": "static"}).read_quantized(NAME)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
@pytest.mark.parametrize("columns", [COLUMNS, 96])
def test_bitsandbytes_four_bits(quant_type: str, storage: torch.dtype, columns: int) -> None:
    """Another storage type gives the same bytes another name; blocks may run across rows."""
    table = np.sort(RANDOM.standard_normal(16)).astype(np.float32)
    codes = RANDOM.integers(0, 16, ROWS * columns)
    absmax = RANDOM.random(ROWS * columns // 64).astype(np.float32)
    packed = torch.from_numpy((codes[::2] << 4 | codes[1::2]).astype(np.uint8)).view(storage).reshape(-1, 1)
    state = json.dumps({"quant_type": quant_type, "blocksize": 64, "dtype": "float16", "shape": [ROWS, columns]})
    tensors = {"weight": packed, "weight.absmax": absmax, "weight.quant_map": table,
               f"weight.quant_state.bitsandbytes__{quant_type}": np.frombuffer(state.encode(), np.uint8).copy()}
    source = opened(tensors, {"quant_method": "bitsandbytes", "load_in_4bit": True})
    expected = (table[codes] * absmax.repeat(64)).reshape(ROWS, columns)
    assert np.array_equal(source.decoded(NAME).numpy(), expected)
    assert source.obstacle(NAME) is not None  # a table of its own


def test_bitsandbytes_eight_bits() -> None:
    codes, absmax = RANDOM.integers(-127, 128, (ROWS, COLUMNS)).astype(np.int8), RANDOM.random(ROWS).astype(np.float32)
    source = opened({"weight": codes, "SCB": absmax}, {"quant_method": "bitsandbytes", "load_in_8bit": True})
    np.testing.assert_allclose(source.decoded(NAME).numpy(), codes * absmax[:, None] / 127, rtol=3e-7)
