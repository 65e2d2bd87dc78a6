"""End-to-end learning with one block in memory: forward block by block, back block by block, computing again.

A step takes some sequences through all blocks, keeping what enters each; the head gives the slope of the loss in its
input; then each block, from the last to the first, is run again with autograd, its parameters move, and the slope in
its input goes to the block before. What is learned of each block, with Adam's two means and the best so far, lies in a
`Shelf`: in memory, or past the budget in a file.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.func import functional_call

from qtool.errors import NumericalError
from qtool.learning import weights
from qtool.learning.block import adam, ordered_attention
from qtool.models import blocks
from qtool.models.blocks import BlockArguments, Read
from qtool.models.skeleton import Skeleton
from qtool.models.statistics import block_output
from qtool.models.streams import StreamStore
from qtool.plan_learning import LOGITS
from qtool.tensors import all_finite

NOW, MEAN, SQUARE, BEST = range(4)  # the rows of a shelf: what is learned, Adam's means, the best so far


class Part(Protocol):
    """What is learned of one block, or of what surrounds them."""

    def begin(self) -> weights.Start: ...
    def read(self, name: str) -> torch.Tensor: ...


@dataclass(frozen=True)
class Setting:
    """ids: int64 [S, T].  entrance, exits: hidden states [S, T, hidden], before the blocks and, of the unquantized
    model, after them.  fitting, held: batches.  group: how many of them make a step.  head: reads the model's own
    tensors around the blocks."""

    skeleton: Skeleton
    ids: torch.Tensor
    entrance: StreamStore
    exits: StreamStore
    arguments: BlockArguments
    fitting: Sequence[slice]
    held: Sequence[slice]
    group: int
    head: Read
    device: torch.device
    dtype: torch.dtype
    folder: Path
    budget: int


@dataclass
class Progress:
    """How far learning has come; all of it is recorded with the shelf. curve: (step, training loss since the last,
    held-out loss)."""

    step: int = 0
    best_step: int = 0
    worse: int = 0
    tokens: int = 0
    seconds: float = 0.0
    curve: list[tuple[int, float | None, float]] = field(default_factory=list)

    @property
    def best(self) -> float:
        return min((held for _, _, held in self.curve), default=math.inf)


class Shelf:
    """float32 [parts, 4, size], each part's moves flattened."""

    def __init__(self, shapes: Sequence[Mapping[str, torch.Size]], folder: Path, budget: int) -> None:
        self.shapes = shapes
        size = max((sum(map(math.prod, one.values())) for one in shapes), default=0)
        self.store = StreamStore(len(shapes), 4, max(size, 1), torch.float32, budget, folder)

    def rows(self, part: int) -> torch.Tensor:
        """[4, size] of one part; a copy."""
        return self.store.read(slice(part, part + 1))[0].clone()

    def put(self, part: int, rows: torch.Tensor) -> None:
        self.store.write(slice(part, part + 1), rows[None])

    def views(self, part: int, row: torch.Tensor) -> weights.Moves:
        """The moves of a part in one of its rows, by name."""
        made, start = {}, 0
        for name, shape in self.shapes[part].items():
            made[name] = row[start:start + math.prod(shape)].view(shape)
            start += math.prod(shape)
        return made

    def keep_best(self) -> None:
        for part in range(len(self.shapes)):
            rows = self.rows(part)
            rows[BEST] = rows[NOW]
            self.put(part, rows)


class Chain:
    """The blocks of a model and what is learned of them; the last part is what surrounds them."""

    def __init__(self, setting: Setting, parts: Sequence[Part], shelf: Shelf, around: Mapping[str, str]) -> None:
        """around: parameters outside of the blocks that are learned, path -> name in the last part."""
        self.setting, self.parts, self.shelf, self.around = setting, parts, shelf, around
        samples = max(sum(one.stop - one.start for one in group) for group in self.groups())
        samples = max(samples, *(one.stop - one.start for one in setting.held))
        hidden, length = setting.skeleton.hidden, setting.ids.shape[1]
        self.kept = StreamStore(len(parts), samples * length, hidden, setting.dtype, setting.budget, setting.folder)
        self.runner = blocks.without_blocks(setting.skeleton, "", self._visit, setting.head, setting.device,
                                            setting.dtype, embedded=True)
        self._state: torch.Tensor | None = None

    def groups(self) -> list[list[slice]]:
        """The batches of each step of an epoch."""
        fitting, size = self.setting.fitting, self.setting.group
        return [list(fitting[start:start + size]) for start in range(0, len(fitting), size)]

    def step(self, batches: Sequence[slice], rates: Callable[[str], float], number: int) -> float:
        """Move everything once by the slope of the mean loss of some batches; that loss."""
        total = sum(one.stop - one.start for one in batches)
        hidden = self._forward(batches, keep=True)
        slopes, losses = [], []
        last = len(self.parts) - 1
        rows = self.shelf.rows(last)
        moves = self._leaves(last, rows[NOW])
        for batch, one in zip(batches, hidden, strict=True):
            loss, slope = self._head(batch, one, moves, (batch.stop - batch.start) / total)
            losses.append(loss)
            slopes.append(slope)
        self._move(last, rows, moves, rates, number)
        for index in reversed(range(last)):
            slopes = self._back(index, batches, slopes, rates, number)
        return math.fsum(losses)

    def loss(self) -> float:
        """The mean loss of the held-out batches."""
        sums, count = [], 0
        with torch.no_grad():
            for batch in self.setting.held:
                size = batch.stop - batch.start
                sums.append(self._head(batch, self._forward([batch], keep=False)[0], None, float(size))[0])
                count += size
        return math.fsum(sums) / count

    @torch.no_grad()
    def _forward(self, batches: Sequence[slice], keep: bool) -> list[torch.Tensor]:
        """The exits [B, T, hidden] of each batch."""
        hidden = [self._entrance(batch) for batch in batches]
        for index, part in enumerate(self.parts[:-1]):
            if keep:
                self._keep(index, hidden)
            moves = self.shelf.views(index, self.shelf.rows(index)[NOW])
            block = self._block(index, part, weights.parameters(part.begin(), moves))
            hidden = [block_output(block, self.setting.arguments, index, one) for one in hidden]
        return hidden

    def _block(self, index: int, part: Part, made: Mapping[str, torch.Tensor]) -> torch.nn.Module:
        """With these parameters, by path, the others as they are stored."""
        setting = self.setting
        prefix = setting.skeleton.blocks[index] + "."
        named = {setting.skeleton.source(prefix + path): tensor.detach() for path, tensor in made.items()}
        return blocks.load_block(setting.skeleton, index,
                                 lambda name: named[name] if name in named else part.read(name),
                                 setting.device, setting.dtype)

    def _back(self, index: int, batches: Sequence[slice], slopes: list[torch.Tensor], rates: Callable[[str], float],
              number: int) -> list[torch.Tensor]:
        """Move a block; the slopes in what enters it."""
        setting, part = self.setting, self.parts[index]
        rows = self.shelf.rows(index)
        moves, begin = self._leaves(index, rows[NOW]), part.begin()
        before = []
        with torch.enable_grad(), ordered_attention(setting.device):
            made = weights.parameters(begin, moves)
            leaves = {path: tensor.detach().to(setting.dtype).requires_grad_() for path, tensor in made.items()}
            block = self._block(index, part, made)
            for entrance, slope in zip(self._kept(index, batches), slopes, strict=True):
                entrance.requires_grad_()
                args, kwargs = setting.arguments.for_block(index, len(entrance))
                output = functional_call(block, leaves, (entrance, *args), kwargs)
                torch.autograd.backward(output[0] if isinstance(output, tuple) else output, slope)
                if entrance.grad is None or not all_finite(entrance.grad):
                    raise NumericalError(f"{setting.skeleton.blocks[index]}: the slope of the loss is not finite; use "
                                         "smaller rates in the step distill, or --set dtype=float32")
                before.append(entrance.grad)
            learned = [path for path in made if made[path].requires_grad and leaves[path].grad is not None]
            torch.autograd.backward([made[path] for path in learned],
                                    [leaves[path].grad.float() for path in learned])  # type: ignore[union-attr]
        self._move(index, rows, moves, rates, number)
        return before

    def _leaves(self, part: int, row: torch.Tensor) -> weights.Moves:
        return {name: view.requires_grad_() for name, view in self.shelf.views(part, row.detach()).items()}

    @torch.no_grad()
    def _move(self, part: int, rows: torch.Tensor, moves: weights.Moves, rates: Callable[[str], float],
              number: int) -> None:
        means, squares = (self.shelf.views(part, rows[row]) for row in (MEAN, SQUARE))
        for name, move in moves.items():
            if move.grad is not None:
                adam(move, move.grad, rates(name), number, means[name], squares[name])
        self.shelf.put(part, rows.detach())

    def _head(self, batch: slice, hidden: torch.Tensor, moves: weights.Moves | None,
              share: float) -> tuple[float, torch.Tensor]:
        """(share of the mean KL per token of this batch, its slope in `hidden`); fills the slopes of `moves`."""
        setting, exits, last = self.setting, self.setting.exits.read(batch), len(self.parts) - 1
        tokens, losses = exits.shape[0] * exits.shape[1], []
        training = moves is not None
        now = moves if moves is not None else self.shelf.views(last, self.shelf.rows(last)[NOW])
        slope = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
        flat = [tensor.reshape(1, -1, tensor.shape[-1]) for tensor in (exits, hidden, slope)]
        with torch.set_grad_enabled(training):
            made = weights.parameters(self.parts[last].begin(), now)
            around = {path: made[name].to(setting.dtype) for path, name in self.around.items()}
        for start in range(0, tokens, LOGITS):  # what follows the blocks looks at one token at a time
            rows = slice(start, start + LOGITS)
            exit_, entrance, into = (tensor[:, rows] for tensor in flat)
            with torch.no_grad():
                goal = self._logits(exit_.to(device=setting.device, dtype=setting.dtype, copy=True), {})
            entrance = entrance.detach().requires_grad_(training)
            with torch.set_grad_enabled(training):
                logits = self._logits(entrance, around)
            loss, of_logits = divergence(goal, logits.detach(), share / tokens, training)
            losses.append(loss)
            if training:
                torch.autograd.backward(logits, of_logits, retain_graph=True)  # of `around`, for the next tokens
                assert entrance.grad is not None
                into.copy_(entrance.grad)
        if not all(map(math.isfinite, losses)):
            raise NumericalError("distill: the divergence from the original model is not finite; use smaller rates")
        return math.fsum(losses), slope

    def _logits(self, hidden: torch.Tensor, changed: Mapping[str, torch.Tensor]) -> torch.Tensor:
        self._state = hidden
        logits: torch.Tensor = functional_call(self.runner, dict(changed), (),
                                               {"inputs_embeds": hidden, "use_cache": False}).logits
        return logits

    def _visit(self, _index: int, _hidden: torch.Tensor, _args: Any, _kwargs: Any) -> Any:
        return (self._state,) if self.setting.arguments.as_tuple else self._state

    def _entrance(self, batch: slice) -> torch.Tensor:
        setting = self.setting
        return setting.entrance.read(batch).to(device=setting.device, dtype=setting.dtype, copy=True)

    def _keep(self, index: int, hidden: Sequence[torch.Tensor]) -> None:
        together = torch.cat([one.reshape(1, -1, one.shape[-1]) for one in hidden], 1)
        missing = self.kept.shape[1] - together.shape[1]
        self.kept.write(slice(index, index + 1), torch.nn.functional.pad(together, (0, 0, 0, missing)))

    def _kept(self, index: int, batches: Sequence[slice]) -> Iterator[torch.Tensor]:
        length, start = self.setting.ids.shape[1], 0
        together = self.kept.read(slice(index, index + 1))[0]
        for batch in batches:
            size = batch.stop - batch.start
            here = together[start:start + size * length].view(size, length, -1)
            start += size * length
            yield here.to(device=self.setting.device, copy=True)


def divergence(goal: torch.Tensor, logits: torch.Tensor, share: float,
               sloped: bool) -> tuple[float, torch.Tensor]:
    """share times the sum of KL(softmax goal || softmax logits) over rows of [..., V], and its slope in the logits (in
    place of `goal`, which is used up)."""
    ours, theirs = logits.float().log_softmax(-1), goal.float().log_softmax(-1)
    probability = theirs.exp()
    total = float((probability * (theirs - ours)).sum(dtype=torch.float64))
    if sloped:
        goal.copy_((ours.exp() - probability) * share)
    return share * total, goal


def learn(chain: Chain, progress: Progress, options: Any, save: Callable[[Progress], None],
          tell: Callable[[str], None]) -> Progress:
    """Take steps until the epochs, the tokens, the minutes or the patience are used up; the shelf has the best."""
    groups, length = chain.groups(), chain.setting.ids.shape[1]
    total = options.epochs * len(groups)
    if options.budget_tokens is not None:
        total = max(1, min(total, options.budget_tokens // (length * sum(one.stop - one.start for one in groups[0]))))
    every = max(1, len(groups) // options.checks)
    began, before, losses = time.monotonic(), progress.seconds, []
    if not progress.curve:
        progress.curve.append((0, None, chain.loss()))
        tell(f"divergence on held-out text {progress.best:.5f}")
        save(progress)
    while progress.step < total and progress.worse < options.patience:
        epoch, place = divmod(progress.step, len(groups))
        batches = groups[place] if epoch % 2 == 0 else groups[-1 - place]
        rate = functools.partial(_rate, options, _share(progress.step, total, options.warmup))
        losses.append(chain.step(batches, rate, progress.step + 1))
        progress.step += 1
        progress.tokens += sum(one.stop - one.start for one in batches) * length
        progress.seconds = before + time.monotonic() - began
        late = options.minutes is not None and progress.seconds > 60 * options.minutes
        if progress.step % every == 0 or progress.step == total or late:
            _check(chain, progress, losses)
            losses = []
            save(progress)
            tell(f"step {progress.step} of {total}: divergence on held-out text {progress.curve[-1][2]:.5f}")
        if late:
            break
    return progress


def _check(chain: Chain, progress: Progress, losses: Sequence[float]) -> None:
    held, best = chain.loss(), progress.best
    progress.curve.append((progress.step, math.fsum(losses) / len(losses) if losses else None, held))
    if held < best:
        progress.best_step, progress.worse = progress.step, 0
        chain.shelf.keep_best()
    else:
        progress.worse += 1


def _share(step: int, total: int, warmup: float) -> float:
    """Of the rate: a linear rise, then a cosine fall to a tenth."""
    first = max(1, round(total * warmup))
    if step < first:
        return (step + 1) / first
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - first) / max(1, total - first)))


def _rate(options: Any, share: float, name: str) -> float:
    what = name.rpartition("|")[2] if "|" in name else ""
    return share * (options.weight_rate if what == weights.LATENT else options.rate if what else options.gain_rate)
