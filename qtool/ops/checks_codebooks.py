"""What the arguments of the ops on additive codebooks must look like; see checks.py."""

from __future__ import annotations

import torch

from qtool.ops.checks import MAX_BLOCK, between, matrix, one_device, require, shape

VECTOR = 8  # columns of a codeword, kVector in csrc/kernels.h
MAX_CODEBOOKS, MAX_WORDS, MAX_BEAM = 8, 1 << 16, 16  # kMaxCodebooks, kMaxWords and kMaxBeam


def refine_codebooks(gradient: torch.Tensor, hessian: torch.Tensor, old_codes: torch.Tensor, scale: torch.Tensor,
                     codebooks: torch.Tensor, roots: torch.Tensor, beam: int) -> None:
    matrix("gradient", gradient, torch.float32)
    rows, columns = gradient.shape
    vectors(columns)
    between("columns", columns, 0, MAX_BLOCK)
    between("beam", beam, 1, MAX_BEAM)
    require(hessian.shape == (columns, columns) and hessian.dtype == torch.float32,
            f"hessian is {hessian.dtype} {shape(hessian)}, not float32 {[columns, columns]}")
    wanted = (columns // VECTOR, VECTOR, VECTOR)
    require(roots.shape == wanted and roots.dtype == torch.float32,
            f"roots is {roots.dtype} {shape(roots)}, not float32 {list(wanted)}")
    coded(old_codes, rows, columns // VECTOR, codebooks)
    scales(scale, rows)
    one_device(gradient, hessian, old_codes, scale, codebooks, roots)


def dequantize_codebooks(codes: torch.Tensor, codebooks: torch.Tensor, scale: torch.Tensor) -> None:
    require(codes.dim() == 3, f"codes has shape {shape(codes)}, not three dimensions")
    coded(codes, codes.shape[0], codes.shape[1], codebooks)
    scales(scale, codes.shape[0])
    one_device(codes, codebooks, scale)


def sum_codewords(values: torch.Tensor, codes: torch.Tensor, words: int) -> None:
    matrix("values", values, torch.float32)
    vectors(values.shape[1])
    between("words", words, 1, MAX_WORDS)
    wanted = (values.shape[0], values.shape[1] // VECTOR)
    require(codes.dim() == 3 and codes.shape[:2] == wanted and codes.dtype == torch.int32,
            f"codes is {codes.dtype} {shape(codes)}, not int32 {[*wanted, 'M']}")
    between("codebooks", codes.shape[2], 1, MAX_CODEBOOKS)
    one_device(values, codes)


def code_values(codes: torch.Tensor, words: int) -> None:
    """Every code is that of a codeword; reads values."""
    if codes.numel():
        low, high = (int(end) for end in codes.aminmax())
        require(low >= 0 and high < words, f"codes {low}..{high} for {words} codewords")


def vectors(columns: int) -> None:
    require(columns % VECTOR == 0, f"{columns} columns are no multiple of {VECTOR}")


def coded(codes: torch.Tensor, rows: int, groups: int, codebooks: torch.Tensor) -> None:
    require(codebooks.dim() == 3 and codebooks.shape[2] == VECTOR and codebooks.dtype == torch.float32,
            f"codebooks is {codebooks.dtype} {shape(codebooks)}, not float32 [M, codewords, {VECTOR}]")
    books, words = codebooks.shape[:2]
    between("codebooks", books, 1, MAX_CODEBOOKS)
    between("codewords", words, 1, MAX_WORDS)
    require(codes.shape == (rows, groups, books) and codes.dtype == torch.int32,
            f"codes is {codes.dtype} {shape(codes)}, not int32 {[rows, groups, books]}")


def scales(scale: torch.Tensor, rows: int) -> None:
    require(scale.shape == (rows,) and scale.dtype == torch.float32,
            f"scale is {scale.dtype} {shape(scale)}, not float32 {[rows]}")
