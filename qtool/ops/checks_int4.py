"""What the arguments of the ops on layouts of 4-bit codes must look like; see checks.py."""

from __future__ import annotations

import torch

from qtool.ops.checks import between, one_device, require, shape

PER_WORD = 8
ALONG_ROWS, TRANSPOSED, AWQ = range(3)  # kInt4Rows, kInt4Columns and kInt4Awq in csrc/kernels.h
MAX_EXTENT = 1 << 40  # kMaxExtent


def repack_int4(words: torch.Tensor, rows: int, columns: int, source: int, target: int) -> None:
    laid_out("words", words, rows, columns, source)
    between("target", target, ALONG_ROWS, AWQ)


def compare_int4(one: torch.Tensor, other: torch.Tensor, rows: int, columns: int, layout: int,
                 other_layout: int) -> None:
    laid_out("one", one, rows, columns, layout)
    laid_out("other", other, rows, columns, other_layout)
    one_device(one, other)


def laid_out(name: str, words: torch.Tensor, rows: int, columns: int, layout: int) -> None:
    between("layout", layout, ALONG_ROWS, AWQ)
    between("rows", rows, 0, MAX_EXTENT)
    between("columns", columns, 0, MAX_EXTENT)
    require(rows % PER_WORD == 0 and columns % PER_WORD == 0, f"{rows} rows, {columns} columns: no multiples of 8")
    wanted = shape_of(rows, columns, layout)
    require(words.shape == wanted and words.dtype == torch.int32,
            f"{name} is {words.dtype} {shape(words)}, not int32 {list(wanted)}")
    require(words.is_contiguous(), f"{name} is not contiguous")


def shape_of(rows: int, columns: int, layout: int) -> tuple[int, int]:
    """Of the words of codes [rows, columns]."""
    blocks = columns // PER_WORD
    return ((rows, blocks), (blocks, rows), (columns, rows // PER_WORD))[layout]
