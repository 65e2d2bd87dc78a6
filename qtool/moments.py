"""Second moments of a linear's inputs: sums over tokens for the Hessian, and what held-out tokens say of an answer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from qtool.quality import square_sum
from qtool.tensors import all_finite

BAND = 512  # rows of a symmetric matrix that are stored as one piece


def add_gram(total: torch.Tensor, x: torch.Tensor) -> None:
    """total [K, K] += xᵀ x of x [T, K], on and below the diagonal; above it only inside the tiles on the diagonal."""
    columns = x.shape[1]
    x = x if x.is_cuda else x.float()
    tile = tile_width(columns)
    for start in range(0, columns, tile):
        add_product(total[start:, start:start + tile], x[:, start:], x[:, start:start + tile])


def add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """total [M, N] float32 += leftᵀ right of left [T, M] and right [T, N], accumulated in float32."""
    if left.is_cuda and left.dtype != torch.float32:
        total += torch.mm(left.T, right, out_dtype=torch.float32)  # the CPU has no such product
    else:
        total.addmm_(left.T.float(), right.float())


def tile_width(columns: int) -> int:
    """Columns per product: narrow tiles save more of the upper triangle, wide ones keep the matrix units busy."""
    return max(128, min(512, columns // 12 // 16 * 16))


def mirror(total: torch.Tensor) -> torch.Tensor:
    """Copy the lower triangle of total [K, K] to the upper one, in place and tile by tile."""
    columns = total.shape[0]
    for start in range(0, columns, 512):
        stop = min(start + 512, columns)
        total[start:stop, stop:] = total[stop:, start:stop].T
        corner = total[start:stop, start:stop].tril()
        total[start:stop, start:stop] = corner + corner.tril(-1).T
    return total


def lower_rows(columns: int) -> list[tuple[int, int]]:
    """The bands of rows [start, stop) in which a symmetric matrix [K, K] is stored: each up to its last diagonal."""
    return [(start, min(start + BAND, columns)) for start in range(0, columns, BAND)]


def lower_size(columns: int) -> int:
    """Elements of a symmetric matrix [K, K] in such bands."""
    return sum((stop - start) * stop for start, stop in lower_rows(columns))


def lower(matrix: torch.Tensor) -> Iterator[torch.Tensor]:
    """The bands of a symmetric matrix [K, K], [rows, up to the last diagonal] each; little more than half of it."""
    for start, stop in lower_rows(len(matrix)):
        yield matrix[start:stop, :stop]


def from_lower(bands: torch.Tensor, columns: int) -> torch.Tensor:
    """The symmetric matrix [K, K] of its bands, one after the other in `bands` [lower_size(K)]."""
    matrix, taken = torch.empty(columns, columns, dtype=bands.dtype, device=bands.device), 0
    for start, stop in lower_rows(columns):
        count = (stop - start) * stop
        band = bands[taken:taken + count].view(stop - start, stop)
        matrix[start:stop, :stop], matrix[:stop, start:stop] = band, band.T
        taken += count
    return matrix


class HeldOut:
    """Tokens that only measure an answer: the mean of x xᵀ [K, K] or, of fewer tokens than columns, the x themselves.

    Beside x [T, K] there may be x~, the inputs of the same tokens in the unquantized model, and r~ - r [T, N], by how
    much what the outputs are added to is off.
    """

    def __init__(self, columns: int, keep_inputs: bool, device: torch.device) -> None:
        self.tokens = 0
        self.paired = False
        self._columns, self._keep, self._device = columns, keep_inputs, device
        self._inputs: list[torch.Tensor] = []  # x, each [some tokens, K]
        self._moves: list[torch.Tensor] = []  # x~ - x
        self._gram: torch.Tensor | None = None  # sum of x xᵀ, lower triangle until `finish`
        self._cross: torch.Tensor | None = None  # sum of (x~ - x) xᵀ
        self._residuals: list[torch.Tensor] = []  # r~ - r
        self._residual: torch.Tensor | None = None  # sum of (r~ - r) xᵀ

    def add(self, x: torch.Tensor, x_float: torch.Tensor | None, residual: torch.Tensor | None = None) -> None:
        """Count the tokens of x [T, K], and of x~ and r~ - r where they are known."""
        self.tokens += len(x)
        self.paired |= x_float is not None
        if self._keep:
            self._inputs.append(x.clone())
            if x_float is not None:
                self._moves.append(x_float - x)
            if residual is not None:
                self._residuals.append(residual)
            return
        self._gram = self._zeros() if self._gram is None else self._gram
        add_gram(self._gram, x)
        if x_float is not None:
            self._cross = self._zeros() if self._cross is None else self._cross
            add_product(self._cross, x_float - x, x)
        if residual is not None:
            if self._residual is None:
                self._residual = zeros(self._columns, self._device, residual.shape[1])
            add_product(self._residual, residual, x)

    def like(self) -> HeldOut:
        """An empty one for the same inputs."""
        return HeldOut(self._columns, self._keep, self._device)

    def absorb(self, other: HeldOut) -> None:
        """Count the tokens of another expert as well, as if they had been added here; x~ is left out."""
        self.tokens += other.tokens
        self._inputs += other._inputs
        if other._gram is not None:
            self._gram = self._zeros() if self._gram is None else self._gram
            self._gram += other._gram

    def finish(self) -> HeldOut:
        """Nothing more will be added. To be called once."""
        if self._gram is not None:
            mirror(self._gram)
        self._inputs = [torch.cat(self._inputs)] if self._inputs else []
        self._moves = [torch.cat(self._moves)] if self._moves else []
        self._residuals = [torch.cat(self._residuals)] if self._residuals else []
        return self

    def state(self) -> dict[str, torch.Tensor]:
        """What it knows once it is finished, where it is there: gram, cross [K, K] and residual [N, K], or inputs,
        moves [T, K] and residuals [T, N]."""
        known = {"inputs": self._inputs, "moves": self._moves, "residuals": self._residuals}
        sums = {"gram": self._gram, "cross": self._cross, "residual": self._residual}
        return {**{name: some[0] for name, some in known.items() if some},
                **{name: total for name, total in sums.items() if total is not None}}

    @classmethod
    def restored(cls, tokens: int, paired: bool, columns: int, state: Mapping[str, torch.Tensor],
                 device: torch.device) -> HeldOut:
        """The one whose `state` this is."""
        self = cls(columns, "gram" not in state, device)
        self.tokens, self.paired = tokens, paired
        self._inputs, self._moves, self._residuals = ([state[name]] if name in state else []
                                                      for name in ("inputs", "moves", "residuals"))
        self._gram, self._cross, self._residual = (state.get(name) for name in ("gram", "cross", "residual"))
        return self

    def finite(self) -> bool:
        sums = [total.diagonal() for total in (self._gram, self._cross) if total is not None]
        sums += [] if self._residual is None else [self._residual]
        return all(map(all_finite, [*sums, *self._inputs, *self._moves, *self._residuals]))

    def energy(self, matrix: torch.Tensor) -> float:
        """Mean of |M x|² for M [N, K] float32: the loss of an answer whose difference to its target is M."""
        if self._gram is not None:
            return float(((matrix @ self._gram) * matrix).sum(dtype=torch.float64)) / self.tokens
        return sum(square_sum(x.float() @ matrix.T) for x in self._inputs) / max(self.tokens, 1)

    @property
    def knows_residual(self) -> bool:
        return self._residual is not None or bool(self._residuals)

    def product(self, one: torch.Tensor, other: torch.Tensor) -> float:
        """Mean of (M x)·(P x) for M, P [N, K] float32."""
        if self._gram is not None:
            return float(((one @ self._gram) * other).sum(dtype=torch.float64)) / self.tokens
        return sum(float(((x.float() @ one.T) * (x.float() @ other.T)).sum(dtype=torch.float64))
                   for x in self._inputs) / max(self.tokens, 1)

    def pull(self, change: torch.Tensor, weight: torch.Tensor) -> float:
        """Mean of (P x)·(W (x~ - x)) for P, W [N, K] float32: how far the change P of W goes towards W x~."""
        if self._cross is not None:
            return float(((change @ self._cross.T) * weight).sum(dtype=torch.float64)) / self.tokens
        return sum(float(((x.float() @ change.T) * (move.float() @ weight.T)).sum(dtype=torch.float64))
                   for x, move in zip(self._inputs, self._moves, strict=True)) / max(self.tokens, 1)

    def pull_back(self, change: torch.Tensor) -> float:
        """Mean of (P x)·(r~ - r) for P [N, K] float32: how far the change P of W makes up for what r is off by."""
        if self._residual is not None:
            return float((change * self._residual).sum(dtype=torch.float64)) / self.tokens
        return sum(float(((x.float() @ change.T) * off.float()).sum(dtype=torch.float64))
                   for x, off in zip(self._inputs, self._residuals, strict=True)) / max(self.tokens, 1)

    def _zeros(self) -> torch.Tensor:
        return zeros(self._columns, self._device)


def zeros(columns: int, device: torch.device, rows: int | None = None) -> torch.Tensor:
    """An empty sum [K, K] or [N, K], float32; no inference tensor, since methods may change it in place after the
    pass."""
    with torch.inference_mode(False):
        return torch.zeros(columns if rows is None else rows, columns, device=device)
