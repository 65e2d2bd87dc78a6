"""Calls the ops as torch has them, without the wrappers, with arguments that are wrong in all ways that there are.

    python -m tests.ops.raw_calls SEED CALLS

Every call must end in an error or in a result; whatever qtool/ops/checks.py refuses must be an error. The last line is
a JSON object: calls, refused, and `wrong`, those that the checks refuse and a kernel took. On stderr every call before
it is made.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from typing import Any

import torch

from qtool.ops import _library, checks, checks_codebooks, checks_int4, checks_packed
from tests.ops.test_library import calls

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.uint8, torch.int8, torch.int32,
          torch.int64, torch.bool, torch.complex64)
INTEGERS = (-(1 << 63), -(1 << 31), -32, -1, 0, 1, 2, 3, 7, 8, 9, 31, 32, 33, 255, 256, 257, 1 << 20, 1 << 31, 1 << 40,
            (1 << 63) - 1)
FLOATS = (float("nan"), float("inf"), -float("inf"), -1.0, 0.0, 1e-45, 3.0, 1e38)
VALUES = (-(1 << 31), -129, -1, 0, 1, 2, 16, 127, 255, 256, (1 << 31) - 1)


def values(tensor: torch.Tensor, random_: random.Random) -> torch.Tensor:
    """The same shape and dtype, other values: indices and codes beyond their ends, NaN and infinity."""
    if not tensor.numel():
        return tensor
    changed = tensor.clone()
    flat = changed.view(-1)
    for _ in range(random_.choice((1, 3))):
        value = random_.choice(FLOATS if tensor.dtype.is_floating_point else VALUES)
        if tensor.dtype in (torch.uint8, torch.int8):
            value = int(value) % 256 - (128 if tensor.dtype == torch.int8 else 0)
        flat[random_.randrange(flat.numel())] = value
    return changed


def tensor(given: torch.Tensor, random_: random.Random) -> torch.Tensor:
    """One thing changed: dtype, rank, a size, the layout in memory, or values."""
    axis = random_.randrange(given.dim()) if given.dim() else 0
    changes: list[Callable[[], torch.Tensor]] = [
        lambda: given.to(random_.choice(DTYPES)), lambda: given.reshape(-1), lambda: given.unsqueeze(0),
        lambda: given.flatten()[:0], lambda: torch.empty(0), lambda: torch.tensor(1.0),
        lambda: given.narrow(axis, 0, max(given.shape[axis] - 1, 0)), lambda: given.repeat_interleave(2, axis),
        lambda: given.t() if given.dim() == 2 else given.transpose(0, -1), lambda: given.flip(axis),
        lambda: given.repeat_interleave(2, -1)[..., ::2], lambda: given[:1].expand(given.shape),
        lambda: given.new_empty((1 << 50, 0)), lambda: given.new_empty((0, 1 << 50)),
        lambda: given.new_empty([0 if place == axis else size for place, size in enumerate(given.shape)]),
        lambda: given.to("meta"), lambda: given.requires_grad_(given.is_floating_point()),
        *[lambda: values(given, random_)] * 8,
    ]
    try:
        return random_.choice(changes)()
    except (RuntimeError, IndexError, NotImplementedError):  # not of such a tensor
        return given


def changed(given: Any, random_: random.Random) -> Any:
    if isinstance(given, torch.Tensor):
        return tensor(given.detach(), random_)
    if isinstance(given, bool):
        return not given
    if isinstance(given, int):
        return random_.choice((*INTEGERS, given - 1, given + 1, given * 2, -given))
    if isinstance(given, float):
        return random_.choice((*FLOATS, -given))
    made = list(given)
    if random_.random() < 0.1:
        return made[:random_.randrange(len(made))]
    place = random_.randrange(len(made))
    made[place] = changed(made[place], random_)
    return made


def refused_by_checks(name: str, arguments: tuple[Any, ...]) -> bool:
    modules = (checks_packed, checks_codebooks, checks_int4, checks)
    check = next(getattr(module, name) for module in modules if hasattr(module, name))
    by_name = dict(zip(_library.SCHEMAS[name].split(") ->")[0].split(", "), arguments, strict=True))
    given = {words.strip("(").split(" ")[-1]: one for words, one in by_name.items()}
    try:
        check(*arguments)
        if "group_index" in given:
            checks.group_values(given["group_index"], given["scale"])
        codes, levels = given.get("codes", given.get("old_codes")), given.get("levels")
        if codes is not None and levels is not None:
            checks.code_values(codes, levels)
        if codes is not None and "codebook" in name or name == "sum_codewords":
            checks_codebooks.code_values(codes, given["words"] if "words" in given else given["codebooks"].shape[1])
        if "fields" in given:
            first = given.get("parts", given.get("packed"))
            width, size = (first.shape[1], given["size"]) if "parts" in given else (given["width"], first.shape[1])
            checks.field_values(given["fields"], width, size)
    except (ValueError, IndexError, TypeError, RuntimeError, NotImplementedError):
        return True
    return False


def main(seed: int, count: int) -> dict[str, Any]:
    random_, right = random.Random(seed), calls("cpu")
    names, told, wrong = sorted(_library.SCHEMAS), {"calls": 0, "refused": 0}, []
    for number in range(count):
        name = names[number % len(names)]
        arguments = list(right[name])
        for _ in range(random_.choice((1, 1, 1, 2, 3))):
            place = random_.randrange(len(arguments))
            arguments[place] = changed(arguments[place], random_)
        print(name, *[one if not isinstance(one, (torch.Tensor, list)) else type(one).__name__ + str(
            (one.dtype, list(one.shape)) if isinstance(one, torch.Tensor) else "") for one in arguments],
            file=sys.stderr, flush=True)  # the last line is the call that crashed
        refused = refused_by_checks(name, tuple(arguments))
        told["calls"] += 1
        try:
            getattr(torch.ops.qtool, name)(*arguments)
        except (RuntimeError, ValueError, IndexError, TypeError, OverflowError, NotImplementedError):
            told["refused"] += 1
        else:
            if refused:
                wrong.append(f"{number}: {name}")
    return {**told, "wrong": wrong}


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.stdout.write(json.dumps(main(int(sys.argv[1]), int(sys.argv[2]))) + "\n")
