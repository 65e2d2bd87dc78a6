"""The ops as PyTorch sees them: schemas, shape functions, wrong arguments, and life without compiled kernels."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qtool import ops
from qtool.ops import _library, packed
from qtool.ops.blocks import DecoderBlock
from tests.ops import cases

ROOT = Path(__file__).parents[2]


FIELDS = torch.tensor([[0, 0, 4, 0, 0], [1, 0, 4, 0, 4], [63, 2, 2, 2, 6]], dtype=torch.int32)


def calls(device: str) -> dict[str, tuple[Any, ...]]:
    """Right arguments of every op, as the schemas have them."""
    weight, weighting, square = cases.weights(8, 64), cases.importance(64), cases.hessian(64)
    (scale, zero), codes, index = cases.grid(8, 2, 4), cases.codes(8, 64, 4), cases.group_index(64, 2)
    small = packed.pack_codes(codes, torch.arange(-8.0, 8.0), scale)
    arguments: dict[str, tuple[Any, ...]] = {
        "fit_affine": (weight, weighting, 32, 4, True, 0, 3, 0.5, True, 1),
        "round_affine": (weight, scale, zero, 32, 4), "dequantize_affine": (codes, scale, zero, 32),
        "solve_columns": (weight, weight, square, scale, zero, index, 4),
        "refine_columns": (weight, square, codes, scale, zero, index, 4),
        "fit_levels": (weight, weighting, *cases.levels(16), 32, 3, 3, 0.5, 1.0, 1),
        "round_levels": (weight, scale, *cases.levels(16), 32),
        "dequantize_levels": (codes, scale, cases.levels(16)[0], 32),
        "solve_levels": (weight, weight, square, scale, *cases.levels(16), index),
        "refine_levels": (weight, square, codes, scale, *cases.levels(16), index),
        "multiply_int8": (cases.signed_codes(5, 64), cases.signed_codes(8, 64, 1), weighting[:5], weighting[:8]),
        "fit_blocks": (weight, weighting, torch.arange(16.0), torch.arange(15.0) + 0.5, 64, 16, 0, 63, 63, 3, 1, 0.5,
                       True),
        "pack_fields": (codes, FIELDS, 3), "unpack_fields": (codes[:, :3].contiguous(), FIELDS, 64),
        "multiply_packed": (cases.weights(3, 64), *small.tensors, small.kind, small.rows, small.group, False),
        "unpack_packed": (*small.tensors, small.kind, 64, small.group, 0, 1), "decode_block": block(),
        "refine_codebooks": (weight, square, *additive(8, 8), torch.eye(8).repeat(8, 1, 1), 3),
        "dequantize_codebooks": (additive(8, 8)[0], additive(8, 8)[2], additive(8, 8)[1]),
        "sum_codewords": (weight, additive(8, 8)[0], 16),
        "repack_int4": (ops.pack_bits(codes, 4), 8, 64, 0, 2),
        "compare_int4": (ops.pack_bits(codes, 4), ops.pack_bits(codes, 4).t().contiguous(), 8, 64, 0, 1),
        "pack_bits": (codes, 4, False), "unpack_bits": (ops.pack_bits(codes, 3, True), 3, 8, True),
    }

    def there(one: Any) -> Any:
        if isinstance(one, list):
            return list(map(there, one))
        return one.to(device) if isinstance(one, torch.Tensor) else one

    return {name: tuple(map(there, given)) for name, given in arguments.items()}


def additive(rows: int, groups: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scales and two codebooks of 16 codewords."""
    codes = cases.codes(rows, groups * 2, 4).reshape(rows, groups, 2).to(torch.int32)
    return codes, cases.importance(rows), cases.weights(2 * 16, 8).reshape(2, 16, 8)


def block() -> tuple[Any, ...]:
    """A decoder block of 16 columns, two heads and one of keys, on its third token."""
    ones, empty = torch.ones(16), torch.empty(0)
    weights, layout = [ones, empty, empty, ones], []
    for rows, columns in ((16, 16), (8, 16), (8, 16), (16, 16), (24, 16), (24, 16), (16, 24)):
        one = packed.pack_dense(cases.weights(rows, columns) / 4)
        weights += [*one.tensors, torch.ones(rows)]
        layout += [one.kind, one.group, one.rows]
    caches = [cases.weights(5, 8, seed).reshape(1, 5, 8) for seed in (1, 2)]
    return cases.weights(1, 16), weights, layout, torch.ones(1, 4), torch.zeros(1, 4), *caches, 2, 5, 1e-5, 0.5, False


@pytest.mark.parametrize("device", cases.DEVICES)
@pytest.mark.parametrize("name", sorted(_library.SCHEMAS))
def test_opcheck(name: str, device: str) -> None:
    torch.library.opcheck(getattr(torch.ops.qtool, name).default, calls(device)[name])


@pytest.mark.parametrize("name", sorted(_library.SCHEMAS))
def test_shapes_without_data(name: str) -> None:
    real, meta = (getattr(torch.ops.qtool, name)(*calls(device)[name]) for device in ("cpu", "meta"))
    for one, other in zip(*(x if isinstance(x, tuple) else (x,) for x in (real, meta)), strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype and other.device.type == "meta"


def test_shape_functions_check_arguments() -> None:
    with pytest.raises(ValueError, match="does not divide 64 columns"):
        torch.ops.qtool.round_affine(*calls("meta")["round_affine"][:3], 48, 4)


def fit_blocks(**changes: Any) -> Any:
    given = {"super_": 64, "sub": 16, "scale_range": (0, 63), "mins": 63, **changes}
    return ops.fit_blocks(torch.ones(2, 64), torch.ones(64), torch.arange(4.0), torch.arange(3.0) + 0.5, **given)


BYTE, ONE = torch.ones(2, 1, dtype=torch.uint8), torch.ones(2, 1)


@pytest.mark.parametrize("call, words", [
    (lambda: ops.fit_affine(torch.ones(2, 30), torch.ones(30), 16, 4, True, torch.float32), "does not divide 30"),
    (lambda: ops.fit_affine(torch.ones(2, 32), torch.ones(31), 16, 4, True, torch.float32), r"importance \[31\]"),
    (lambda: ops.fit_affine(torch.ones(2, 32), torch.ones(32), 16, 9, True, torch.float32), "bits is 9"),
    (lambda: ops.fit_affine(torch.ones(2, 32), torch.ones(32), 16, 4, True, torch.int8), "scale_dtype torch.int8"),
    (lambda: ops.fit_affine(torch.ones(2, 32), torch.ones(32), 16, 4, True, torch.float16, 0), "steps 0"),
    (lambda: ops.fit_affine(torch.ones(2, 32), torch.ones(32), 16, 4, True, torch.float16, 2, 0.0), "shrink_min"),
    (lambda: ops.fit_affine(torch.ones(2, 32).int(), torch.ones(32), 16, 4, True, torch.float32), "floating point"),
    (lambda: ops.round_affine(torch.ones(2, 32), ONE, ONE, 32, 4), "not uint8"),
    (lambda: ops.round_affine(torch.ones(2, 32), ONE, BYTE, 16, 4), r"should be \[2, 2\]"),
    (lambda: ops.round_affine(torch.ones(2, 32), ONE.to("meta"), BYTE, 32, 4), "different devices: cpu, meta"),
    (lambda: ops.round_levels(torch.ones(2, 32), ONE, torch.ones(4), torch.ones(4), 32), r"levels \[4\], edges \[4\]"),
    (lambda: ops.round_levels(torch.ones(2, 32), ONE, torch.ones(257), torch.ones(256), 32), r"levels \[257\]"),
    (lambda: ops.dequantize_levels(BYTE.expand(2, 32) * 4, ONE, torch.ones(4), 32), "code 4 for 4 levels"),
    (lambda: ops.multiply_int8(BYTE, BYTE, ONE[:, 0], ONE[:, 0]), "left is torch.uint8, not torch.int8"),
    (lambda: ops.multiply_int8(BYTE.char(), BYTE.char().t(), ONE[:, 0], ONE[0]), "other numbers of columns"),
    (lambda: ops.multiply_int8(BYTE.char(), BYTE.char(), ONE, ONE[:, 0]), r"left_scale is .* not float32 \[2\]"),
    (lambda: ops.multiply_int8(BYTE.char(), BYTE.char(), ONE[:, 0], ONE[0]), r"right_scale is .* not float32 \[2\]"),
    (lambda: ops.multiply_int8(BYTE.char(), BYTE.char(), ONE[:, 0], ONE[:, 0].to("meta")), "different devices"),
    (lambda: ops.multiply_int8(*[BYTE.char()[:1].expand(1, 1 << 17)] * 2, ONE[0], ONE[0]), "may not fit into 32 bits"),
    (lambda: fit_blocks(super_=48), "does not divide 64"), (lambda: fit_blocks(sub=24), "sub 24 for super 64"),
    (lambda: fit_blocks(scale_range=(0, 0)), "scale_low 0, scale_high 0"),
    (lambda: fit_blocks(mins=256), "mins is 256"),
    (lambda: fit_blocks(mins=0), "the lowest level is negative"), (lambda: fit_blocks(steps=0), "steps 0"),
    (lambda: torch.ops.qtool.unpack_packed(*calls("meta")["unpack_packed"][:-1], 2), "tiles 0 to 2 of 1"),
    (lambda: changed(1, torch.ones(1, 2, 5, 32)), r"words is torch.float32 \[1, 2, 5, 32\]"),
    (lambda: changed(1, torch.ones(1, 2, 9, 32, dtype=torch.int32)), "kind 0 of 9 bits"),
    (lambda: changed(1, torch.ones(1, 3, 4, 32, dtype=torch.int32)), "3 chunks for 64 columns"),
    (lambda: changed(2, torch.ones(1, 3, 32)), r"scale is torch.float32 \[1, 3, 32\], not \[1, 2, 32\]"),
    (lambda: changed(3, torch.ones(2)), r"offset is .* or empty"), (lambda: changed(7, 12), "group 12 for 64 columns"),
    (lambda: changed(6, 65), "1 tiles for 65 outputs"), (lambda: changed(5, 1), r"levels is .* for kind 1"),
    (lambda: wrong_block(3, 16), "position 3, 1 tokens in a cache of 3"), (lambda: wrong_block(-1, 16), "position -1"),
    (lambda: wrong_block(0, 15), "hidden is not float32"), (lambda: wrong_block(0, 16, 0), "window 0"),
    (lambda: ops.pack_bits(torch.ones(3, dtype=torch.uint8), 4), "two dimensions"),
    (lambda: ops.pack_bits(torch.ones(3, 3), 4), "codes is torch.float32"),
    (lambda: ops.unpack_bits(torch.ones(3, 2, dtype=torch.int32), 4, 99), "2 words cannot hold 99"),
    (lambda: solve(index=torch.full((8,), 3)), r"group_index 3\.\.3 for 1 groups"),
    (lambda: solve(index=torch.full((8,), -1)), r"group_index -1\.\.-1"),
    (lambda: solve(index=torch.zeros(7)), r"not int32 \[8\]"),
    (lambda: solve(columns=257, index=torch.zeros(257)), "257 columns are more than 256"),
    (lambda: solve(index=torch.zeros(8), factor=torch.ones(8, 7)), "do not fit"),
])
def test_wrong_arguments(call: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


def changed(index: int, argument: Any) -> object:
    arguments = list(calls("meta")["multiply_packed"])
    arguments[index] = argument.to("meta") if isinstance(argument, torch.Tensor) else argument
    return torch.ops.qtool.multiply_packed(*arguments)


def wrong_block(position: int, columns: int, window: int = 3) -> object:
    _, weights, layout, cos, sin, keys, values, *_ = block()
    keys, values = keys[:, :3].contiguous(), values[:, :3].contiguous()
    made = DecoderBlock(tuple(weights), tuple(layout), keys, values, window, 1e-5, 0.5)
    return made(torch.ones(1, columns), cos, sin, position)


def solve(index: torch.Tensor, columns: int = 8, factor: torch.Tensor | None = None) -> object:
    weight = torch.ones(2, columns)
    factor = torch.ones(columns, columns) if factor is None else factor
    return ops.solve_columns(weight, weight, factor, ONE, BYTE, index.to(torch.int32), 4)


def test_a_library_that_does_not_load_leaves_the_reference(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "qtool", tmp_path / "qtool", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (tmp_path / "qtool" / "_native.so").write_bytes(b"built for another machine")
    script = ("import torch; from qtool import ops; print(ops.backend(), ops.native_available(), "
              "ops.pack_bits(torch.ones(1, 8, dtype=torch.uint8), 4).tolist())")
    result = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert result.stdout == "reference (no compiled extension) False [[286331153]]\n"


def test_installing_without_a_compiler_succeeds(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    result = subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "-b", tmp_path, "-t", tmp_path], cwd=ROOT,
                            env={**os.environ, "CXX": str(tmp_path / "none")}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "the pure-torch ops will run" in result.stderr and not list(tmp_path.rglob("*.so"))
