"""Training one block so that its output comes close to the unquantized block's (AutoRound's and EfficientQAT's loss).

The loss of a token is |y - t|² / (median of |t - x|² over the batch), with t the output of the unquantized block on
what the unquantized model gives it, x the input of the quantized one: how far the block is off, in units of what it
does. Tokens whose error is larger than `clip` times the mean count as that: a few tokens carry activations that are
thousands of times the others'.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from qtool.learning.weights import Moves

Parameters = dict[str, torch.Tensor]
Apply = Callable[[Moves], Parameters]  # what the block's parameters are after some moves
Loss = Callable[[slice, Parameters], torch.Tensor]  # of one batch: a scalar, differentiable in the parameters


@dataclass(frozen=True)
class Schedule:
    """rates: of each move by the last part of its name; Adam's, or SignSGD's where `signed` says so.

    epochs: over the fitting batches.  checks: how often in an epoch the held-out loss is looked at.  bound: of signed
    moves.
    """

    rates: Callable[[str], float]
    epochs: int
    batches: int  # whose gradients make one step
    signed: Callable[[str], bool] = lambda name: False
    bound: float = 0.5
    checks: int = 2
    patience: int = 3


@dataclass(frozen=True)
class Outcome:
    """moves: the best seen, all zero where nothing was better.  before, after: held-out losses.  steps: taken; kept:
    after which of them the moves were best."""

    moves: Moves
    before: float
    after: float
    steps: int
    kept: int


def descend(moves: Moves, apply: Apply, loss: Loss, fitting: Sequence[slice], held: Sequence[slice],
            schedule: Schedule) -> Outcome:
    """Minimise the loss over the fitting batches; what is kept is what is best on the held-out ones.

    The order of the batches is that of the text, forwards and backwards in turn, so two runs are equal.
    """
    with torch.no_grad():
        best, before = _copied(moves), _mean(loss, held, apply(moves))
    after, kept, step, worse = before, 0, 0, 0
    total = schedule.epochs * math.ceil(len(fitting) / schedule.batches)
    every = max(1, total // max(1, schedule.epochs * schedule.checks))
    momenta: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for epoch in range(schedule.epochs):
        order = list(fitting) if epoch % 2 == 0 else list(reversed(fitting))
        for first in range(0, len(order), schedule.batches):
            part = order[first:first + schedule.batches]
            _differentiate(moves, apply, loss, part)
            step += 1
            share = 1 - (step - 1) / total  # linear decay
            for name, move in moves.items():
                _step(name, move, share, step, schedule, momenta)
            if step % every == 0 or step == total:
                with torch.no_grad():
                    now = _mean(loss, held, apply(moves))
                worse = worse + 1 if not now < after else 0
                if now < after:
                    best, after, kept = _copied(moves), now, step
                if worse >= schedule.patience or not math.isfinite(now):
                    return Outcome(best, before, after, step, kept)
    return Outcome(best, before, after, step, kept)


def _differentiate(moves: Moves, apply: Apply, loss: Loss, batches: Sequence[slice]) -> None:
    """Leave in the moves the slope of the mean loss of some batches; one batch's activations are held at a time."""
    with torch.enable_grad(), ordered_attention(next(iter(moves.values())).device):
        made = apply(moves)
        leaves = {path: tensor.detach().requires_grad_() for path, tensor in made.items()}
        for batch in batches:
            (loss(batch, leaves) / len(batches)).backward()
        learned = [path for path, tensor in made.items() if tensor.requires_grad and leaves[path].grad is not None]
        torch.autograd.backward([made[path] for path in learned], [leaves[path].grad for path in learned])


def ordered_attention(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Attention whose slopes are summed in one order: on a GPU the fast ones add in any, on a CPU none does."""
    return contextlib.nullcontext() if device.type == "cpu" else sdpa_kernel(SDPBackend.MATH)


@torch.no_grad()
def _step(name: str, move: torch.Tensor, share: float, step: int, schedule: Schedule,
          momenta: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    slope, move.grad = move.grad, None
    if slope is None:
        return
    rate = schedule.rates(name) * share
    if schedule.signed(name):
        move.sub_(slope.sign_(), alpha=rate).clamp_(-schedule.bound, schedule.bound)
    else:
        adam(move, slope, rate, step, *momenta.setdefault(name, (torch.zeros_like(move), torch.zeros_like(move))))


@torch.no_grad()
def adam(move: torch.Tensor, slope: torch.Tensor, rate: float, step: int, mean: torch.Tensor,
         square: torch.Tensor) -> None:
    """One step of Adam (arXiv 1412.6980, betas 0.9 and 0.99); all in place."""
    mean.lerp_(slope, 0.1)
    square.lerp_(slope.square_(), 0.01)
    move.addcdiv_(mean, (square / (1 - 0.99**step)).sqrt_().add_(1e-12), value=-rate / (1 - 0.9**step))


def _copied(moves: Moves) -> Moves:
    return {name: move.detach().clone() for name, move in moves.items()}


@torch.no_grad()
def _mean(loss: Loss, batches: Sequence[slice], parameters: Parameters) -> float:
    """Over samples, summed in order in float64."""
    sums = [(float(loss(batch, parameters)), batch.stop - batch.start) for batch in batches]
    return math.fsum(value * count for value, count in sums) / sum(count for _, count in sums)


def output_loss(output: torch.Tensor, target: torch.Tensor, entrance: torch.Tensor, clip: float) -> torch.Tensor:
    """See above; all [B, T, hidden]. clip: how many times the mean a token's error may count."""
    errors = (output - target).float().square().mean(-1)
    with torch.no_grad():
        size = (target - entrance).float().square().mean(-1)
        typical = size.median().clamp_min(torch.finfo(torch.float32).tiny)
        limit = clip * errors.mean()
        shrink = torch.where(errors > limit, limit / errors.clamp_min(torch.finfo(torch.float32).tiny), 1.0)
    return (errors * shrink).mean() / typical
