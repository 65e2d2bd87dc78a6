"""Which option each group takes under a limit on their total size: the multiple-choice knapsack, on plain numbers.

Dynamic programming over the exact total size (Kellerer, Pferschy, Pisinger: Knapsack Problems, 2004, chapter 11). Sizes
are counted beyond each group's smallest and in their greatest common divisor; for the weights of a model that is some
thousands of steps, so the answer is exact. Where the divisor is too small for that, sizes are rounded up to a step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

MAX_STEPS = 200_000
FILL = 0.995  # of the limit that should be used where the options allow it

Options = Sequence[tuple[int, float]]  # (size, loss) of what a group may take


def choose(groups: Sequence[Options], limit: int, fixed: int = 0) -> list[int]:
    """The option of each group with the least total loss whose total size is in [FILL * limit, limit].

    Where no choice lies in that range: the least loss of those below. fixed: what else counts towards the limit. Equal
    losses are settled by the larger size, then by the earlier option of the last group. Raises ValueError when even the
    smallest options exceed the limit.
    """
    least = fixed + sum(min(size for size, _ in options) for options in groups)
    room = limit - least
    if room < 0:
        raise ValueError(f"the smallest options need {least}, the limit is {limit}")
    extra = [[size - min(size for size, _ in options) for size, _ in options] for options in groups]
    step = max(math.gcd(*(size for sizes in extra for size in sizes)), -(-room // MAX_STEPS), 1)
    steps = [[-(-size // step) for size in sizes] for sizes in extra]
    total, taken = _totals(steps, groups, min(room // step, sum(map(max, steps))))
    filled = max(0, min(math.ceil((FILL * limit - least) / step), len(total)))
    end = filled + _best(total[filled:]) if bool(torch.isfinite(total[filled:]).any()) else _best(total)
    chosen = []
    for sizes, options in zip(reversed(steps), reversed(taken), strict=True):
        chosen.append(int(options[end]))
        end -= sizes[chosen[-1]]
    return chosen[::-1]


def _totals(steps: Sequence[Sequence[int]], groups: Sequence[Options],
            room: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The least loss by exact total [room + 1] (infinite where there is none), and the option that each group takes."""
    total = torch.full((room + 1,), math.inf, dtype=torch.float64)
    total[0] = 0.0
    taken = []
    for sizes, options in zip(steps, groups, strict=True):
        after, choice = torch.full_like(total, math.inf), torch.zeros(room + 1, dtype=torch.uint8)
        for index, (size, (_, loss)) in enumerate(zip(sizes, options, strict=True)):
            if size <= room:
                reached = total[:room + 1 - size] + loss
                better = reached < after[size:]
                after[size:] = torch.where(better, reached, after[size:])
                choice[size:][better] = index
        total = after
        taken.append(choice)
    return total, taken


def _best(total: torch.Tensor) -> int:
    """The last index of the least value."""
    return len(total) - 1 - int(total.flip(0).argmin())
