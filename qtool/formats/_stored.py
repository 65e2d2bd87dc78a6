"""What the integer formats share: a weight as it was read, checks of what was read, and checks before packing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import ValidationError

from qtool.errors import CheckpointError, NumericalError
from qtool.recipe import Scheme, shown
from qtool.tensors import QuantizedTensor, TensorSpec, all_finite, group_count

Read = Callable[[str], torch.Tensor]  # raises KeyError for a tensor that is not there
PACKABLE_BITS = (2, 3, 4, 8)
QUANTIZATION_KEYS = ("quantization_config", "compression_config", "quantization")  # of config.json


@dataclass(frozen=True)
class Stored:
    """A weight as a file has it: W[n, k] = (codes[n, k] - zero_point[n, g(k)]) * scale[n, g(k)].

    codes: uint8 [N, K].  scale: floating [N, G].  zero_point: uint8 [N, G].
    group_index: int64 [K], the group g(k) of every column; None when groups of K / G columns follow each other.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor
    group_index: torch.Tensor | None = None

    def dequantize(self) -> torch.Tensor:
        """float32 [N, K]."""
        scale, zero = self.scale.float(), self.zero_point.float()
        if self.group_index is not None:
            return (self.codes.float() - zero[:, self.group_index]) * scale[:, self.group_index]
        rows, groups = scale.shape
        centred = self.codes.view(rows, groups, -1).float() - zero.unsqueeze(-1)
        return (centred * scale.unsqueeze(-1)).view(rows, -1)

    def quantized(self, linear_name: str, scheme: Scheme) -> QuantizedTensor:
        """The same as a QuantizedTensor; CheckpointError when the groups are not runs of equal length."""
        reason = order_obstacle(self.group_index)
        if reason:
            raise CheckpointError(f"{linear_name}: {reason}; read it as dense weights instead (qtool export --to hf, "
                                  "or --requantize)")
        symmetric = scheme.symmetric and bool((self.zero_point == 1 << (scheme.bits - 1)).all())
        group_size = self.codes.shape[1] // self.scale.shape[1]
        return QuantizedTensor(self.codes, self.scale, self.zero_point, scheme.bits, group_size, symmetric)


def order_obstacle(index: torch.Tensor | None) -> str | None:
    """Why codes whose columns belong to these groups cannot be kept as they are in another format, or None."""
    if index is None:
        return None
    runs = bool((index.diff() >= 0).all())
    reason = "its groups are not all of one length" if runs else "its columns are in activation order (g_idx)"
    return f"{reason}, so its codes cannot be kept as they are"


def contiguous_or(index: torch.Tensor, columns: int, groups: int) -> torch.Tensor | None:
    """The group of every column, or None when it says no more than 'equal runs, one after the other'."""
    if columns % groups == 0 and torch.equal(index, torch.arange(columns) // (columns // groups)):
        return None
    return index


def group_index(where: str, tensor: torch.Tensor, columns: int, groups: int) -> torch.Tensor | None:
    """A stored g_idx, checked; negative entries count from the end as GPTQModel does."""
    index = expect(where, tensor, (torch.int32, torch.int64), (columns,)).long()
    index = torch.where(index < 0, index + groups, index)
    if columns and (int(index.min()) < 0 or int(index.max()) >= groups):
        raise CheckpointError(f"{where}: an entry is outside the {groups} groups; the file is damaged, fetch it again")
    return contiguous_or(index, columns, groups)


def running_index(columns: int, groups: int, group_size: int) -> torch.Tensor | None:
    """Groups of group_size columns one after the other, the last one perhaps shorter."""
    return None if columns % groups == 0 else torch.arange(columns) // group_size


def expect(where: str, tensor: torch.Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]) -> torch.Tensor:
    """`tensor`, which must have one of the dtypes and this shape; else CheckpointError."""
    if tensor.dtype not in dtypes or tuple(tensor.shape) != shape:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise CheckpointError(f"{where}: expected {wanted} {list(shape)}, found "
                              f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}; "
                              "the tensor does not fit the quantization_config in config.json")
    return tensor


def quantization_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The quantization_config inside a config.json (also where a multimodal config keeps it); {} when there is none.

    MLX calls it "quantization" too.
    """
    if "quant_method" in config:
        return config
    for holder in (config, config.get("text_config")):
        if isinstance(holder, Mapping):
            for key in QUANTIZATION_KEYS:
                if isinstance(holder.get(key), Mapping):
                    return holder[key]
    return {}


def scheme_of(linear_name: str, bits: Any, group_size: Any, symmetric: Any) -> Scheme:
    """The Scheme that a foreign configuration speaks of; CheckpointError when it is none."""
    try:
        if not isinstance(group_size, int):
            raise CheckpointError(f"{linear_name}: quantization_config has group_size {group_size!r}, not a number")
        return Scheme(bits=bits, group_size=group_size, symmetric=symmetric)
    except ValidationError as error:
        reason = "; ".join(entry["msg"] for entry in error.errors())
        raise CheckpointError(f"{linear_name}: quantization_config asks for bits={shown(bits)}, "
                              f"group_size={shown(group_size)}, symmetric={shown(symmetric)}, which is not understood: "
                              f"{reason}") from None


def refuse(name: str, scheme: Scheme, linear_name: str, shape: tuple[int, int]) -> str | None:
    """The reasons for which no integer format can hold a linear, with the nearest scheme that works; else None."""
    if scheme.grid != "affine":
        return (f"{name} holds integers, not the {scheme.grid} grid of {linear_name}; "
                f"nearest: grid affine, {scheme.bits} bits")
    if scheme.activations:
        return (f"{name} holds weights only, but {linear_name} has activations: {scheme.activations}; leave that out, "
                "or --format compressed-tensors")
    if scheme.bits not in PACKABLE_BITS:
        nearest = min(PACKABLE_BITS, key=lambda bits: (abs(bits - scheme.bits), -bits))
        return f"{name} packs 2, 3, 4 or 8 bits, not the {scheme.bits} of {linear_name}; nearest: {nearest} bits"
    group, columns = int(scheme.group_size), shape[1]
    if group != -1 and columns % group:
        return (f"group_size {group} does not divide the {columns} input columns of {linear_name}; "
                f"nearest that does: {nearest_group(group, columns)}")
    return None


def refuse_odd(name: str, linear_name: str, shape: tuple[int, int]) -> str | None:
    """Why a format that packs both sides by 32 cannot hold a linear; None when it can."""
    if shape[0] % 32 == 0 and shape[1] % 32 == 0:
        return None
    return (f"{name} packs outputs and inputs by 32, but {linear_name} has {shape[0]} outputs and {shape[1]} inputs; "
            "nearest that works: --format compressed-tensors, which has no such limit")


def per_row(scale: torch.Tensor, rows: int) -> torch.Tensor:
    """[N, 1] of a scale that others may keep once for the whole matrix; anything else as it is."""
    return scale.reshape(1, 1).expand(rows, 1) if scale.numel() == 1 else scale


def nearest_group(group_size: int, columns: int) -> int:
    """The largest power of two up to group_size that divides columns, at least 8; -1 (per channel) if there is none."""
    size = 1 << (group_size.bit_length() - 1)
    while size >= 8:
        if columns % size == 0:
            return size
        size //= 2
    return -1


def packable(linear_name: str, tensor: QuantizedTensor, dtype: torch.dtype) -> torch.Tensor:
    """The scales of `tensor` in `dtype`, after checking that it can be written without changing any value.

    Raises NumericalError for a scale that is not finite or that `dtype` cannot hold, ValueError (a programming error)
    for codes, zero points or shapes that contradict each other.
    """
    rows, columns = tensor.codes.shape
    groups = group_count(columns, tensor.group_size)
    if tensor.scale.shape != (rows, groups) or tensor.zero_point.shape != (rows, groups):
        raise ValueError(f"{linear_name}: codes {[rows, columns]} in groups of {tensor.group_size} need scales and "
                         f"zeros {[rows, groups]}, not {list(tensor.scale.shape)} and {list(tensor.zero_point.shape)}")
    top = (1 << tensor.bits) - 1
    whole = not tensor.codes.is_meta  # else words of so many bits, which hold nothing larger
    if rows and columns and ((whole and int(tensor.codes.max()) > top) or int(tensor.zero_point.max()) > top):
        raise ValueError(f"{linear_name}: a code or zero point is larger than {top}, the largest of {tensor.bits} bits")
    if tensor.symmetric and not bool((tensor.zero_point == 1 << (tensor.bits - 1)).all()):
        raise ValueError(f"{linear_name}: called symmetric, but a zero point is not {1 << (tensor.bits - 1)}")
    scale = tensor.scale.to(dtype)
    if dtype is tensor.scale.dtype and all_finite(scale):
        return scale.contiguous()
    exact = scale.double() == tensor.scale.double()
    if not bool((exact & torch.isfinite(scale)).all()):
        value = float(tensor.scale[~(exact & torch.isfinite(scale))][0])
        raise NumericalError(f"{linear_name}: {str(dtype).removeprefix('torch.')} cannot hold the scale {value:g}; "
                             "leave this linear unquantized with a rule that skips it, or choose another format")
    return scale.contiguous()


def stored_linears(specs: Mapping[str, TensorSpec], suffix: str) -> list[str]:
    """The linears that have a tensor called <linear>.<suffix>, in the order of specs."""
    return [name.removesuffix(f".{suffix}") for name in specs if name.endswith(f".{suffix}")]
