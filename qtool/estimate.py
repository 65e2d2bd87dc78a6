"""Peak memory and temporary files of a plan, before it runs. Every term is one buffer that the pipeline really holds.

Memory is that of the process on a CPU; the terms are named so that `--dry-run --json` can be held against a profile.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from qtool import found, heap
from qtool.budget import MEASURED
from qtool.models.backward import ROWS
from qtool.models.skeleton import Skeleton
from qtool.plan_learning import LOGITS
from qtool.recipe import Recipe
from qtool.tensors import CHUNK_ELEMENTS, any_number

if TYPE_CHECKING:
    from qtool.stages import LinearPlan, Stage

PAGE = 4096


@dataclass(frozen=True)
class Work:
    """What the estimates look at."""

    skeleton: Skeleton
    stages: tuple[Stage, ...]
    recipe: Recipe
    device: torch.device
    model_dtype: torch.dtype
    compute_dtype: torch.dtype
    samples: int
    calibrated: bool
    float_share: float
    rotated: bool = False
    learning: bool = False  # on blocks
    latent: bool = False  # weights before rounding too
    distilling: int = 0  # tokens of a step on the whole model; 0: none
    follows_residual: bool = False  # statistics of what outputs are added to, too
    surveys_moments: bool = False  # before the block is solved, of all its linears at once

    @property
    def streams(self) -> int:
        """How many run through the blocks: one, or with the unquantized model's two."""
        return 2 if self.float_share else 1

    @property
    def tokens(self) -> int:
        return self.samples * self.recipe.calibration.sequence_length


def resident() -> int:
    """Bytes of memory that this process holds now (0 where the system does not tell)."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * PAGE
    except OSError:
        return 0


def meminfo() -> dict[str, int]:
    """Bytes by name, where the system tells (Linux)."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return {}
    pairs = (line.split(":") for line in lines if ":" in line)
    return {name: int(value.split()[0]) * 1024 for name, value in pairs}


def memory(work: Work) -> dict[str, int]:
    """Bytes by purpose; `peak` is the largest sum that is held at one time by the process, `gpu` by the device."""
    base = resident()
    terms = _memory(work, base)
    if work.recipe.search_samples:
        terms |= _search(work)
        terms["peak"] = max(terms["peak"], base + terms["search"])
    return terms


def temporary(work: Work) -> dict[str, int]:
    """Bytes of files that are there while running only, by purpose; `peak`: the most at one time.

    resume: the stream at the entrance of a block and, before that is removed, of the next.  spilled: the streams past
    memory_budget_gb.  parts: inputs and outputs of the parts of a block.  search: of a budget, before the blocks.
    learning: the state of distill, as it was saved, as it is being saved, and itself where it is larger than its share.
    """
    resume = 2 * _stream(work) * work.streams if work.calibrated and len(work.skeleton.blocks) > 1 else 0
    spilled = _stream(work) * work.streams - _held(work) if work.calibrated else 0
    parts = _kept(work) if work.calibrated else 0
    search = _search(work)["search_files"] if work.recipe.search_samples else 0
    learning = 3 * _state(work) if work.distilling else 0
    return {"resume": resume, "spilled": spilled, "parts": parts, "search": search,
            **({"learning": learning} if learning else {}), "peak": max(resume + spilled + parts + learning, search)}


def _memory(work: Work, base: int) -> dict[str, int]:
    largest = max((spec.nbytes for stage in work.stages for spec in stage.outputs), default=0)
    solve = max((_solving(group_of([one], work), work) for stage in work.stages for one in stage.linears), default=0)
    trial = max(_trial(work.skeleton, index) for index in range(len(work.skeleton.blocks))) if work.rotated else 0
    outside = max((_outside(linear, work) for stage in work.stages for linear in stage.outside), default=0)
    if not work.calibrated:
        return {"runtime": base, "tensor": largest, "solve": solve, "outside": outside, "trial": trial,
                "peak": base + max(largest, solve, outside, trial)}
    blocks = [_block(stage, work) for stage in work.stages if stage.block is not None]
    weights, statistics, solve, forward, source = (max(values) for values in zip(*blocks, strict=True))
    learn = max(_learning(stage, work) for stage in work.stages if stage.block is not None) if work.learning else 0
    held = _held(work)
    embedding = work.skeleton.vocabulary * work.skeleton.hidden * work.model_dtype.itemsize
    running = weights + max(statistics + forward, solve, learn)
    around = max(embedding + forward, source + max(largest, outside))
    terms = {"runtime": base, "stream": held, "weights": weights, "statistics": statistics, "solve": solve,
             "forward": forward, "read_ahead": source, "embedding": embedding, "outside": outside, "trial": trial,
             **({"learning": learn} if learn else {}), **({"distilling": _distilling(work)} if work.distilling else {})}
    around = max(around, terms.get("distilling", 0))
    if work.device.type == "cpu":
        most = max(held + max(running + source, around), trial)
        kept = min(heap.TRIMMED_FROM, most - held)  # of what was freed
        return {**terms, "kept": kept, "peak": base + most + kept}
    on_device = max(running, embedding + forward)
    return {**terms, "gpu": on_device, "peak": base + max(held + source + max(largest, outside), trial)}


def _stream(work: Work) -> int:
    return work.tokens * work.skeleton.hidden * work.model_dtype.itemsize


def _held(work: Work) -> int:
    """Bytes of the streams in memory; one past its share of the budget lies in a file."""
    share = int(work.recipe.memory_budget_gb * 1e9) // work.streams
    return _stream(work) * work.streams if _stream(work) <= share else 0


def _outside(linear: LinearPlan, work: Work) -> int:
    """An embedding or head that is quantized in chunks of rows: packed and read back whole, one chunk's temporaries."""
    rows, columns = linear.shape
    packed = rows * columns * linear.scheme.bits // 8
    return 2 * packed + 40 * min(CHUNK_ELEMENTS, rows * columns)


def _trial(skeleton: Skeleton, index: int) -> int:
    """A block in float32 on which rotations are tried; its experts share the weights of the first."""
    shapes = {any_number(name): skeleton.parameters[name] for name in skeleton.block_parameters(index)}
    return 4 * sum(map(math.prod, shapes.values()))


def _kept(work: Work) -> int:
    """Inputs and outputs of the parts of a block (staged.py), in files; a GPU keeps none."""
    if work.device.type != "cpu":
        return 0
    widest = max((linear.shape[1] for stage in work.stages for linear in stage.linears), default=0)
    return work.tokens * (widest + 2 * work.skeleton.hidden) * work.model_dtype.itemsize * work.streams


def _search(work: Work) -> dict[str, int]:
    """The search for schemes (sensitivity.py): the stream and its gradient with the head or with one block; its files.

    The head: the embedding, itself, logits, their gradient and some rows in float32. A block: all its statistics, what
    autograd keeps of a batch (the scores of the attention too), or one solve.
    """
    length, compute, hidden = work.recipe.calibration.sequence_length, work.compute_dtype.itemsize, work.skeleton.hidden
    tokens = work.recipe.search_samples * length
    measured = int(tokens * MEASURED) + length
    stream = tokens * hidden * work.model_dtype.itemsize + measured * hidden * 4
    vocabulary = work.skeleton.vocabulary
    head = vocabulary * (hidden * (work.model_dtype.itemsize + compute) + 3 * length * compute + 4 * ROWS * 4)
    batch, largest, kept = work.recipe.calibration.batch_tokens or 0, 0, 0
    for stage in work.stages:
        if stage.block is not None:
            groups, elements = _groups(stage, work), sum(one.shape[0] * one.shape[1] for one in stage.linears)
            widest = max((max(one.shape) for one in stage.linears), default=0)
            forward = batch * (6 * widest + 12 * hidden + 3 * length * hidden // 64) * compute
            solve = max((_solving(group, work) for group in groups), default=0)
            sums = sum(4 * group.columns**2 for group in groups)
            kept = max(kept, sum(one.shape[1] * work.model_dtype.itemsize + one.shape[0] * 4 for one in stage.linears
                                 if ".experts." not in one.name))
            largest = max(largest, elements * (compute + work.model_dtype.itemsize) + sums + max(forward, solve))
    held = stream if stream <= int(work.recipe.memory_budget_gb * 1e9) else 0
    blocks = sum(stage.block is not None for stage in work.stages)
    files = tokens * hidden * work.model_dtype.itemsize * (blocks + 1) + measured * (8 * hidden + kept)
    return {"search": held + max(head, largest), "search_files": files}


def _block(stage: Stage, work: Work) -> tuple[int, int, int, int, int]:
    """(weights, statistics, solving with them, forward, blocks as read) of one block, in bytes."""
    compute, elements = work.compute_dtype.itemsize, sum(one.shape[0] * one.shape[1] for one in stage.linears)
    groups = _groups(stage, work)
    sums = [_statistics(group, work) for group in groups]
    solving = [_solving(group, work) for group in groups]
    if any(".experts." in one.name for one in stage.linears):  # all are collected before the first is solved
        statistics, solve = sum(sums), sum(sums) + max(solving)
    else:
        statistics, solve = max(sums, default=0), max(solving, default=0)
    if work.surveys_moments:
        surveyed = sum(4 * group.columns**2 for group in groups)
        statistics = max(statistics, surveyed)
        solve = max(solve, surveyed + max(_equalizing(group) for group in groups))
    batch = work.recipe.calibration.batch_tokens or 0  # the plan fills it in
    widest = max((max(one.shape) for one in stage.linears), default=0)
    forward = batch * (3 * widest + 6 * work.skeleton.hidden) * compute
    as_read = elements * work.model_dtype.itemsize
    # this block's weights as read are the block's own where no conversion is needed; the next block's come on top
    return (elements * compute * work.streams, statistics, solve, forward,
            as_read * (1 if work.compute_dtype is work.model_dtype else 2))


def _equalizing(group: Group) -> int:
    """What the search for scales holds: W, target, |W|, its powers and a product; H scaled, in order, and L."""
    return group.rows * group.columns * 20 + group.columns**2 * 12


def _backward(work: Work) -> int:
    """What autograd keeps of one batch in one block, scores of the attention too."""
    batch, length = work.recipe.calibration.batch_tokens or 0, work.recipe.calibration.sequence_length
    widest = max((max(one.shape) for stage in work.stages for one in stage.linears), default=0)
    hidden = work.skeleton.hidden
    return batch * (6 * widest + 12 * hidden + 3 * length * hidden // 64) * work.compute_dtype.itemsize


def _learning(stage: Stage, work: Work) -> int:
    """Of a block that learns (learning/tune.py): weights and targets of its linears and what measures them, codes,
    parameters with their slopes; of latent weights themselves, their moves, slopes, Adam's means and the best."""
    elements = sum(one.shape[0] * one.shape[1] for one in stage.linears)
    measures = sum(_held_out(group, work) for group in _groups(stage, work))
    return elements * (8 + 1 + 12 + (28 if work.latent else 0)) + measures + _backward(work)


def _state(work: Work) -> int:
    """What distill learns, with Adam's means and the best: four float32 of a latent weight, or of about every scale."""
    weights = sum(one.shape[0] * one.shape[1] for stage in work.stages for one in stage.linears)
    return weights * 16 if work.latent else weights // 2


def _distilling(work: Work) -> int:
    """Of learning on the whole model (learning/whole.py): codes, moves and what enters the blocks, in memory within
    their shares of the budget; the output head; a block with its slopes, and logits with theirs, which are not there
    at one time, but the heap keeps small ones."""
    blocks = [stage for stage in work.stages if stage.block is not None]
    elements = [sum(one.shape[0] * one.shape[1] for one in stage.linears) for stage in blocks]
    budget, largest, total = int(work.recipe.memory_budget_gb * 1e9), max(elements), sum(elements)
    held = total * (5 if work.latent else 1)
    entering = (len(blocks) + 1) * work.distilling * work.skeleton.hidden * work.compute_dtype.itemsize
    kept = sum(size for size, share in ((held, budget // 2), (_state(work), budget // 4), (entering, budget // 4),
                                        (_stream(work), budget // 4)) if size <= share)
    around = work.skeleton.vocabulary * work.skeleton.hidden * (work.model_dtype.itemsize + work.compute_dtype.itemsize)
    some = min(LOGITS, work.distilling) * work.skeleton.vocabulary * work.compute_dtype.itemsize
    logits, block = 8 * some, largest * (24 if work.latent else 16) + _backward(work)
    return kept + around + (logits + block if some < heap.MAPPED_FROM else max(logits, block))


class Group(NamedTuple):
    """Linears that will probably be solved together.  tail: the rows whose outputs will probably be added to the stream
    between blocks, so that a target may follow that; all or 0."""

    rows: int
    columns: int
    tail: int = 0


def group_of(linears: Sequence[LinearPlan], work: Work) -> Group:
    """The group of linears that share their input. The tail is an upper bound: rows that are as many as the hidden
    width, of a linear alone, whose outputs may go through a norm or be added together with others'."""
    rows, alone = sum(one.shape[0] for one in linears), len(linears) == 1 and ".experts." not in linears[0].name
    follows = work.follows_residual and alone and rows == work.skeleton.hidden
    return Group(rows, linears[0].shape[1], rows if follows else 0)


def _groups(stage: Stage, work: Work) -> list[Group]:
    """Of linears with the same parent module and the same input width."""
    members: dict[tuple[str, int], list[LinearPlan]] = {}
    for one in stage.linears:
        members.setdefault((one.name.rpartition(".")[0], one.shape[1]), []).append(one)
    return [group_of(linears, work) for linears in members.values()]


def _statistics(group: Group, work: Work) -> int:
    """Sums over the inputs of one group while they are collected: H, of paired tokens again, cross, residual; held-out
    tokens."""
    matrices = 1 if not work.float_share else 2 if work.float_share == 1 else 3
    return 4 * group.columns * (group.columns * matrices + group.tail) + _held_out(group, work)


def _held_out(group: Group, work: Work) -> int:
    tokens = math.ceil(work.samples * work.recipe.calibration.held_out) * work.recipe.calibration.sequence_length
    if tokens < group.columns:
        return tokens * (group.columns * work.streams + group.tail) * work.compute_dtype.itemsize
    return 4 * group.columns * (group.columns * work.streams + group.tail)


def _solving(group: Group, work: Work) -> int:
    """Working set of one solve, statistics included.

    The target: W, its change twice (of two changes: both and what one is made of); H, H of the paired tokens, L and the
    matrix that it comes from. The codes: W, target, the decoded answer, D, E, codes; H, H in solving order, L.
    """
    weights, columns = group.rows * group.columns, group.columns
    if not work.calibrated:
        return weights * (work.model_dtype.itemsize + 4 + 4 + 4 + 2)
    changes = weights * (20 if group.tail else 12)
    target = changes + columns**2 * 4 * (4 if work.float_share < 1 else 3) if work.float_share else 0
    codes = weights * ((20 if work.float_share else 16) + 3) + columns**2 * 4 * 3
    if any("aqlm" in step for step in work.recipe.steps):  # two answers with E, three more; H, L, what they make
        grid = found.load("grids", work.recipe.scheme.grid)
        words = grid.books * grid.words if hasattr(grid, "books") else 0
        codes = weights * 54 + columns**2 * 4 * 7 + words * 1024  # tables and 8 x 8 factors of each codeword
    return max(target, codes) + _held_out(group, work)
