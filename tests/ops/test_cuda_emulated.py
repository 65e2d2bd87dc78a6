"""The CUDA kernels' logic where no GPU is: compiled for the CPU, threads as coroutines, compared with the CPU ops."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qtool import ops
from qtool.ops import reference, reference_levels
from tests.ops import cases

ROOT = Path(__file__).parents[2]
LAUNCH = re.compile(r"(\w+(?:<\d+>)?)<<<(.+?), (\w+), 0, stream>>>\((.*?)\);", re.DOTALL)

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")


class FitOptions(ctypes.Structure):
    _fields_ = [("columns", ctypes.c_int64), ("group", ctypes.c_int64), ("bits", ctypes.c_int64),
                ("symmetric", ctypes.c_bool), ("signed_scale", ctypes.c_bool), ("scale_type", ctypes.c_int64),
                ("steps", ctypes.c_int64), ("rounds", ctypes.c_int64), ("shrink_min", ctypes.c_float)]


class LevelFitOptions(ctypes.Structure):
    _fields_ = [("columns", ctypes.c_int64), ("group", ctypes.c_int64), ("scale_type", ctypes.c_int64),
                ("steps", ctypes.c_int64), ("rounds", ctypes.c_int64), ("shrink_min", ctypes.c_float),
                ("top", ctypes.c_float)]


class Levels(ctypes.Structure):
    """Passed by value. The tensors must outlive the call."""

    _fields_ = [("values", ctypes.c_void_p), ("edges", ctypes.c_void_p), ("count", ctypes.c_int64),
                ("e4m3", ctypes.c_bool)]


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., None]:
    """Calls a launcher by name: tensors as pointers, integers as int64, no stream."""
    folder = tmp_path_factory.mktemp("emulated")
    source = "\n".join(LAUNCH.sub(r"emulated::launch(\2, \3, [&] { \1(\4); });", path.read_text())
                       for path in sorted((ROOT / "kernels_cuda").glob("*.cu")) if path.name != "bindings.cu")
    assert "<<<" not in source
    (folder / "kernels.cpp").write_text(source)
    library = folder / "kernels.so"
    subprocess.run(["g++", "-O1", "-std=c++20", "-shared", "-fPIC", "-ffp-contract=off", "-w",
                    f"-I{ROOT / 'tests/ops/emulated'}", f"-I{ROOT / 'kernels_cuda'}", folder / "kernels.cpp",
                    "-o", library], check=True)
    loaded = ctypes.CDLL(str(library))

    def call(name: str, *arguments: torch.Tensor | int | ctypes.Structure) -> None:
        converted: list[object] = []
        for argument in arguments:
            if isinstance(argument, torch.Tensor):
                assert argument.is_contiguous()
                converted.append(ctypes.c_void_p(argument.data_ptr()))
            elif isinstance(argument, int):
                converted.append(ctypes.c_int64(argument))
            elif isinstance(argument, Levels):
                converted.append(argument)
            else:
                converted.append(ctypes.byref(argument))
        assert loaded[f"cuda_{name}"](*converted, ctypes.c_void_p(0)) == 0

    return call


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_codes(*shape: int, bits: int = 4) -> torch.Tensor:
    return torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(7), dtype=torch.uint8)


@pytest.mark.parametrize("symmetric, signed", [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("scale_type", [0, 1, 2])
def test_fit(kernel: Callable[..., None], symmetric: bool, signed: bool, scale_type: int) -> None:
    for rows, columns, group, steps, rounds in ((5, 64, 32, 24, 2), (3, 40, 40, 1, 0), (9, 21, 7, 5, 1)):
        weight, importance = random(rows, columns), random(columns, seed=1).abs()
        weight[0], weight[1, 3] = 0, float("nan")
        importance[:group] = 0  # all candidates are equal: the first must win
        scale, zero = torch.empty(rows, columns // group), torch.empty(rows, columns // group, dtype=torch.uint8)
        options = FitOptions(columns, group, 4, symmetric, signed, scale_type, steps, rounds, 0.4)
        kernel("fit_affine", weight, importance, options, scale, zero, rows)
        expected = torch.ops.qtool.fit_affine(weight, importance, group, 4, symmetric, scale_type, steps, 0.4, signed,
                                              rounds)
        assert torch.equal(scale, expected[0]) and torch.equal(zero, expected[1])


@pytest.mark.parametrize("columns", [1, 31, 32, 33, 64, 100, 128, 256])
def test_sweeps(kernel: Callable[..., None], columns: int) -> None:
    for rows in (1, 8, 11):
        scale, zero = random(rows, 3).abs() / 8 + 0.01, random_codes(rows, 3)
        index = (torch.arange(columns) % 3).to(torch.int32)
        codes, change = torch.empty(rows, columns, dtype=torch.uint8), torch.empty(rows, columns)
        weight, shift, factor = random(rows, columns), random(rows, columns, seed=1), 0.2 * random(columns, columns)
        factor = factor.contiguous()  # not triangular: what lies below the diagonal must not be read
        kernel("solve_columns", weight, shift, factor, scale, zero, index, columns, 3, 4, codes, change, rows)
        expected = reference.solve_columns(weight, shift, factor, scale, zero, index, 4)
        assert torch.equal(codes, expected[0]) and torch.equal(change, expected[1])

        hessian, old = factor @ factor.T + torch.eye(columns), random_codes(rows, columns)
        hessian[0, 0] = 0  # never moves
        kernel("refine_columns", weight, hessian, old, scale, zero, index, columns, 3, 4, codes, change, rows)
        expected = reference.refine_columns(weight, hessian, old, scale, zero, index, 4)
        assert torch.equal(codes, expected[0]) and torch.equal(change, expected[1])


@pytest.mark.parametrize("bits", range(2, 9))
def test_elementwise(kernel: Callable[..., None], bits: int) -> None:
    rows, columns, group = 7, 45, 15
    weight, scale, zero = random(rows, columns), random(rows, 3) / 8, random_codes(rows, 3, bits=bits)
    codes, values = torch.empty(rows, columns, dtype=torch.uint8), torch.empty(rows, columns)
    kernel("round_affine", weight, scale, zero, columns, group, bits, codes, rows)
    assert torch.equal(codes, ops.round_affine(weight, scale, zero, group, bits))
    kernel("dequantize_affine", codes, scale, zero, columns, group, values, rows)
    assert torch.equal(values, ops.dequantize_affine(codes, scale, zero, group))
    for name, transposed, count, other in (("rows", False, columns, rows), ("columns", True, rows, columns)):
        expected = ops.pack_bits(codes, bits, transposed)
        words, back = torch.empty_like(expected), torch.empty_like(codes)
        kernel(f"pack_{name}", codes, count, other, bits, words, other)
        assert torch.equal(words, expected)
        kernel(f"unpack_{name}", words, count, other, bits, back, other)
        assert torch.equal(back, codes)


@pytest.mark.parametrize("count", [2, 16, 253])
def test_levels(kernel: Callable[..., None], count: int) -> None:
    values, edges = cases.levels(count)
    levels = Levels(values.data_ptr(), edges.data_ptr(), count)
    for scale_type in range(len(ops.SCALE_TYPES)):
        for rows, columns, group, steps, rounds in ((5, 64, 32, 24, 2), (3, 40, 40, 1, 0), (9, 21, 7, 5, 1)):
            weight, importance = random(rows, columns), random(columns, seed=1).abs()
            weight[0], weight[1, 3] = 0, float("nan")
            importance[:group] = 0
            scale, codes = torch.empty(rows, columns // group), torch.empty(rows, columns, dtype=torch.uint8)
            options = LevelFitOptions(columns, group, scale_type, steps, rounds, 0.4, float(values.abs().max()))
            kernel("fit_levels", weight, importance, options, levels, scale, rows)
            expected = torch.ops.qtool.fit_levels(weight, importance, values, edges, group, scale_type, steps, 0.4,
                                                  options.top, rounds)
            assert torch.equal(scale, expected)
            kernel("round_levels", weight, scale, levels, columns, group, codes, rows)
            assert torch.equal(codes, ops.round_levels(weight, scale, values, edges, group))
            dense = torch.empty(rows, columns)
            kernel("dequantize_levels", codes, scale, levels, columns, group, dense, rows)
            assert torch.equal(dense, ops.dequantize_levels(codes, scale, values, group))
    for columns in (1, 33, 128, 256):
        rows, index = 11, (torch.arange(columns) % 3).to(torch.int32)
        weight, factor, scale = random(rows, columns), 0.2 * random(columns, columns), random(rows, 3).abs() / 8 + 0.01
        codes, change = torch.empty(rows, columns, dtype=torch.uint8), torch.empty(rows, columns)
        kernel("solve_levels", weight, weight, factor, scale, levels, index, columns, 3, codes, change, rows)
        solved = reference_levels.solve_levels(weight, weight, factor, scale, values, edges, index)
        assert torch.equal(codes, solved[0]) and torch.equal(change, solved[1])
        hessian, old = factor @ factor.T + torch.eye(columns), random_codes(rows, columns, bits=8) % count
        kernel("refine_levels", weight, hessian, old, scale, levels, index, columns, 3, codes, change, rows)
        moved = reference_levels.refine_levels(weight, hessian, old, scale, values, edges, index)
        assert torch.equal(codes, moved[0]) and torch.equal(change, moved[1])


@pytest.mark.parametrize("columns", [0, 1, 4, 63, 64, 130])
def test_multiply_int8(kernel: Callable[..., None], columns: int) -> None:
    for tokens, outputs in ((1, 1), (64, 64), (65, 3), (7, 130), (0, 5), (5, 0)):
        left, right = cases.signed_codes(tokens, columns), cases.signed_codes(outputs, columns, 1)
        scales, product = (random(tokens), random(outputs, seed=1)), torch.full((tokens, outputs), torch.nan)
        kernel("multiply_int8", left, right, *scales, tokens, columns, outputs, product, outputs)
        assert torch.equal(product, reference.multiply_int8(left, right, *scales))


def test_multiply_int8_off_the_words(kernel: Callable[..., None]) -> None:
    """Rows that begin at no multiple of four bytes, though their length is one."""
    codes = cases.signed_codes(1, 1 + 5 * 64).flatten()[1:].reshape(5, 64)
    scale, product = random(5), torch.empty(5, 5)
    kernel("multiply_int8", codes, codes, scale, scale, 5, 64, 5, product, 5)
    assert torch.equal(product, reference.multiply_int8(codes, codes, scale, scale))
