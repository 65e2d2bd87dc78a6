"""What the arguments of each op must look like: one function per op, with the op's own arguments.

The wrappers call these before the op, the shape functions (fakes) before they answer. A wrong argument is a bug in the
caller: ValueError with the shapes in its text.
"""

from __future__ import annotations

import torch

MAX_BLOCK = 256  # columns of solve_columns and refine_columns, kMaxColumns in csrc/kernels.h
# ScaleType there; the last two only for grids of levels
SCALE_TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e8m0fnu)
MAX_LEVELS = 256
MAX_SEARCH = 10_000  # steps and rounds
MAX_FIELDS = 1 << 16  # bytes of a block of bit fields
MAX_PRODUCTS = 1 << 17  # of two signed bytes, whose sum fits into 32 bits


def words(count: int, bits: int) -> int:
    """32-bit words that hold `count` codes."""
    return (count * bits + 31) // 32


def fit_affine(weight: torch.Tensor, importance: torch.Tensor, group: int, bits: int, symmetric: bool, scale_type: int,
               steps: int, shrink_min: float, signed_scale: bool, rounds: int) -> None:
    matrix("weight", weight, torch.float32)
    groups(weight, group)
    between("bits", bits, 2, 8)
    require(importance.shape == weight.shape[1:] and importance.dtype == torch.float32,
            f"importance {shape(importance)} for weight {shape(weight)}")
    between("scale_type", scale_type, 0, 2)
    searches(steps, rounds)
    require(0 < shrink_min <= 1, f"shrink_min is {shrink_min}, not above 0 and at most 1")
    one_device(weight, importance)


def round_affine(weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, group: int, bits: int) -> None:
    matrix("weight", weight, torch.float32)
    between("bits", bits, 2, 8)
    grid(weight, scale, zero, group)


def dequantize_affine(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, group: int) -> None:
    matrix("codes", codes, torch.uint8)
    grid(codes, scale, zero, group)


def solve_columns(weight: torch.Tensor, shift: torch.Tensor, factor: torch.Tensor, scale: torch.Tensor,
                  zero: torch.Tensor, group_index: torch.Tensor, bits: int) -> None:
    matrix("weight", weight, torch.float32)
    matrix("shift", shift, torch.float32)
    between("bits", bits, 2, 8)
    block(weight, shift, factor, scale, zero, group_index)


def refine_columns(gradient: torch.Tensor, hessian: torch.Tensor, old_codes: torch.Tensor, scale: torch.Tensor,
                   zero: torch.Tensor, group_index: torch.Tensor, bits: int) -> None:
    matrix("gradient", gradient, torch.float32)
    matrix("codes", old_codes, torch.uint8)
    between("bits", bits, 2, 8)
    block(gradient, old_codes, hessian, scale, zero, group_index)


def fit_levels(weight: torch.Tensor, importance: torch.Tensor, values: torch.Tensor, edges: torch.Tensor, group: int,
               scale_type: int, steps: int, shrink_min: float, top: float, rounds: int) -> None:
    matrix("weight", weight, torch.float32)
    groups(weight, group)
    require(importance.shape == weight.shape[1:] and importance.dtype == torch.float32,
            f"importance {shape(importance)} for weight {shape(weight)}")
    between("scale_type", scale_type, 0, len(SCALE_TYPES) - 1)
    searches(steps, rounds)
    require(0 < shrink_min <= 2 and top > 0, f"shrink_min {shrink_min}, top {top}")
    levels(values, edges)
    one_device(weight, importance, values, edges)


def round_levels(weight: torch.Tensor, scale: torch.Tensor, values: torch.Tensor, edges: torch.Tensor,
                 group: int) -> None:
    matrix("weight", weight, torch.float32)
    level_grid(weight, scale, values, group)
    levels(values, edges)
    one_device(weight, edges)


def dequantize_levels(codes: torch.Tensor, scale: torch.Tensor, values: torch.Tensor, group: int) -> None:
    matrix("codes", codes, torch.uint8)
    level_grid(codes, scale, values, group)


def solve_levels(weight: torch.Tensor, shift: torch.Tensor, factor: torch.Tensor, scale: torch.Tensor,
                 values: torch.Tensor, edges: torch.Tensor, group_index: torch.Tensor) -> None:
    matrix("weight", weight, torch.float32)
    matrix("shift", shift, torch.float32)
    levels(values, edges)
    one_device(weight, values, edges)
    block(weight, shift, factor, scale, None, group_index)


def refine_levels(gradient: torch.Tensor, hessian: torch.Tensor, old_codes: torch.Tensor, scale: torch.Tensor,
                  values: torch.Tensor, edges: torch.Tensor, group_index: torch.Tensor) -> None:
    matrix("gradient", gradient, torch.float32)
    matrix("codes", old_codes, torch.uint8)
    levels(values, edges)
    one_device(gradient, values, edges)
    block(gradient, old_codes, hessian, scale, None, group_index)


def fit_blocks(weight: torch.Tensor, importance: torch.Tensor, values: torch.Tensor, edges: torch.Tensor, super_: int,
               sub: int, scale_low: int, scale_high: int, mins: int, steps: int, rounds: int, energy: float,
               uniform: bool) -> None:
    matrix("weight", weight, torch.float32)
    groups(weight, super_)
    between("super", super_, 1, 256)
    require(sub > 0 and super_ % sub == 0 and super_ // sub <= 16, f"sub {sub} for super {super_}")
    require(-128 <= scale_low <= scale_high <= 127 and (scale_low < 0 or scale_high > 0),
            f"scale_low {scale_low}, scale_high {scale_high}")
    between("mins", mins, 0, 255)
    require(importance.shape == weight.shape[1:] and importance.dtype == torch.float32,
            f"importance {shape(importance)} for weight {shape(weight)}")
    searches(steps, rounds)
    require(energy >= 0, f"energy {energy}")
    levels(values, edges)
    one_device(weight, importance, values, edges)


def pack_fields(parts: torch.Tensor, fields: torch.Tensor, size: int) -> None:
    matrix("parts", parts, torch.uint8)
    field_table(fields, parts.shape[1], size)
    one_device(parts, fields)


def unpack_fields(packed: torch.Tensor, fields: torch.Tensor, width: int) -> None:
    matrix("packed", packed, torch.uint8)
    field_table(fields, width, packed.shape[1])
    one_device(packed, fields)


def multiply_int8(left: torch.Tensor, right: torch.Tensor, left_scale: torch.Tensor,
                  right_scale: torch.Tensor) -> None:
    matrix("left", left, torch.int8)
    matrix("right", right, torch.int8)
    columns = left.shape[1]
    require(columns == right.shape[1], f"left {shape(left)} and right {shape(right)} have other numbers of columns")
    require(columns < MAX_PRODUCTS, f"sums over {columns} columns may not fit into 32 bits")
    for name, scale, rows in (("left_scale", left_scale, left), ("right_scale", right_scale, right)):
        require(scale.shape == rows.shape[:1] and scale.dtype == torch.float32,
                f"{name} is {scale.dtype} {shape(scale)}, not float32 [{rows.shape[0]}]")
    one_device(left, right, left_scale, right_scale)


def pack_bits(codes: torch.Tensor, bits: int, transposed: bool) -> None:
    matrix("codes", codes, torch.uint8)
    between("bits", bits, 2, 8)


def unpack_bits(packed: torch.Tensor, bits: int, count: int, transposed: bool) -> None:
    matrix("words", packed, torch.int32)
    between("bits", bits, 2, 8)
    have = packed.shape[0 if transposed else 1]
    require(count >= 0 and have == words(count, bits), f"{have} words cannot hold {count} codes of {bits} bits")


def field_table(fields: torch.Tensor, width: int, size: int) -> None:
    matrix("fields", fields, torch.int32)
    require(fields.shape[1] == 5 and 0 <= width <= MAX_FIELDS and 0 <= size <= MAX_FIELDS,
            f"fields {shape(fields)}, width {width}, size {size}")


def field_values(fields: torch.Tensor, width: int, size: int) -> None:
    """Every field lies within its part and its byte; reads values."""
    if fields.numel():
        part, first, bits, byte, at = fields.unbind(1)
        inside = (part >= 0) & (part < width) & (byte >= 0) & (byte < size) & (first >= 0) & (bits > 0) & (at >= 0)
        require(bool((inside & (first + bits <= 8) & (at + bits <= 8)).all()), "a field lies outside its block")


def group_values(group_index: torch.Tensor, scale: torch.Tensor) -> None:
    """Every column's group exists. Apart from the others because it reads values, which shape functions do not have."""
    if group_index.numel():
        low, high = (int(end) for end in group_index.aminmax())
        require(low >= 0 and high < scale.shape[1], f"group_index {low}..{high} for {scale.shape[1]} groups")


def code_values(codes: torch.Tensor, values: torch.Tensor) -> None:
    """Every code is one of the levels; reads values too."""
    if codes.numel():
        top = int(codes.max())
        require(top < len(values), f"code {top} for {len(values)} levels")


def searches(steps: int, rounds: int) -> None:
    require(1 <= steps <= MAX_SEARCH and 0 <= rounds <= MAX_SEARCH, f"steps {steps}, rounds {rounds}")


def require(right: bool, text: str) -> None:
    if not right:
        raise ValueError(f"qtool.ops: {text}")


def shape(tensor: torch.Tensor) -> str:
    return str(list(tensor.shape))


def between(name: str, value: int, low: int, high: int) -> None:
    require(low <= value <= high, f"{name} is {value}, not {low} to {high}")


def matrix(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    require(tensor.dim() == 2, f"{name} has shape {shape(tensor)}, not two dimensions")
    require(tensor.dtype == dtype, f"{name} is {tensor.dtype}, not {dtype}")


def one_device(first: torch.Tensor, *others: torch.Tensor) -> None:
    devices = [str(tensor.device) for tensor in (first, *others)]
    require(len(set(devices)) == 1, f"tensors lie on different devices: {', '.join(devices)}")


def groups(weight: torch.Tensor, group: int) -> None:
    require(group > 0 and weight.shape[1] % group == 0, f"group_size {group} does not divide {weight.shape[1]} columns")


def grid(weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, group: int) -> None:
    groups(weight, group)
    wanted = (weight.shape[0], weight.shape[1] // group)
    require(scale.shape == wanted and zero.shape == wanted,
            f"scale {shape(scale)} and zero point {shape(zero)} should be {list(wanted)}")
    kinds(scale, zero)
    one_device(weight, scale, zero)


def levels(values: torch.Tensor, edges: torch.Tensor) -> None:
    count = len(values) if values.dim() == 1 else 0
    require(2 <= count <= MAX_LEVELS and edges.shape == (count - 1,), f"levels {shape(values)}, edges {shape(edges)}")
    require(values.dtype == edges.dtype == torch.float32, f"levels {values.dtype}, edges {edges.dtype}, not float32")


def level_grid(weight: torch.Tensor, scale: torch.Tensor, values: torch.Tensor, group: int) -> None:
    groups(weight, group)
    wanted = (weight.shape[0], weight.shape[1] // group)
    require(scale.shape == wanted, f"scale {shape(scale)} should be {list(wanted)}")
    require(scale.dtype == values.dtype == torch.float32, f"scale is {scale.dtype}, levels {values.dtype}, not float32")
    one_device(weight, scale, values)


def kinds(scale: torch.Tensor, zero: torch.Tensor) -> None:
    require(scale.dtype == torch.float32, f"scale is {scale.dtype}, not float32")
    require(zero.dtype == torch.uint8, f"zero point is {zero.dtype}, not uint8")


def block(weight: torch.Tensor, second: torch.Tensor, square: torch.Tensor, scale: torch.Tensor,
          zero: torch.Tensor | None, group_index: torch.Tensor) -> None:
    rows, columns = weight.shape
    require(columns <= MAX_BLOCK, f"{columns} columns are more than {MAX_BLOCK}")
    require(second.shape == weight.shape and square.shape == (columns, columns) and square.dtype == torch.float32,
            f"shapes {shape(weight)}, {shape(second)} and {shape(square)} do not fit")
    require(scale.dim() == 2 and scale.shape[0] == rows and scale.dtype == torch.float32,
            f"scale {scale.dtype} {shape(scale)} for {rows} rows")
    if zero is not None:
        require(scale.shape == zero.shape, f"scale {shape(scale)}, zero point {shape(zero)} for {rows} rows")
        kinds(scale, zero)
    require(group_index.shape == (columns,) and group_index.dtype == torch.int32,
            f"group_index is {group_index.dtype} {shape(group_index)}, not int32 [{columns}]")
    one_device(weight, second, square, scale, group_index, *(() if zero is None else (zero,)))
