"""Additive codebooks on the layer loss tr(D H Dᵀ), D = target - value (AQLM, arXiv 2401.06118).

Scales of rows and codebooks begin with residual k-means, in which the diagonal blocks of H weigh. Then the codes of a
group of 8 columns are found in order, with the feedback of those before it, as GPTQ does it for single columns: with
H = L Lᵀ the loss is |D L|², so group g, taken last to first, is a search near
    t_g = W_g + Σ_{i>g} D_i L_ig L_gg⁻¹   under the metric L_gg L_ggᵀ.
Rounds follow, each of three moves that never raise the loss: least squares over all codewords (conjugate gradients),
least squares over the scales, and a sweep of beam searches over the codes with E = D H kept up to date.
AQLM's own training of whole blocks is the step tune.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from pydantic import Field

from qtool import found
from qtool.errors import NumericalError
from qtool.grids._codebooks import CodebookGrid, row_scales
from qtool.grids._kmeans import BLOCK, VECTOR, curvature, factor_words, roots_of, solve_words, start
from qtool.layer import Layer, damped, factor
from qtool.ops import codebooks as ops
from qtool.ops.checks_codebooks import MAX_BEAM
from qtool.quality import unit_of
from qtool.recipe import Scheme, Strict
from qtool.tensors import QuantizedTensor, all_finite

CALIBRATED = True
CODEBOOKS = True


class Options(Strict):
    """beam: partial sums that a search keeps.  kmeans_rounds: of the start.  rounds: at most, of the three moves.

    tolerance: rounds end when one lowers the loss by less than this share.  iterations: of conjugate gradients in a
    round.  damping, damping_mode: see gptq.
    """

    beam: int = Field(8, ge=1, le=MAX_BEAM)
    kmeans_rounds: int = Field(8, ge=1, le=100)
    rounds: int = Field(8, ge=0, le=100)
    tolerance: float = Field(0.005, ge=0.0, lt=1.0)
    iterations: int = Field(6, ge=1, le=200)
    damping: float = Field(0.01, ge=0.0, le=1.0)
    damping_mode: str = Field("mean", pattern="^(mean|relative)$")


@dataclass(frozen=True)
class State:
    """An answer while it is improved. codes int32 [N, K / 8, M]; codebooks [M, words, 8], scale [N], as they will be
    stored, in float32.  error: E = D H, float32 [N, K].  loss: of each row, float64 [N]."""

    codes: torch.Tensor
    codebooks: torch.Tensor
    scale: torch.Tensor
    error: torch.Tensor
    loss: torch.Tensor

    def values(self) -> torch.Tensor:
        return ops.dequantize_codebooks(self.codes, self.codebooks, self.scale)


def check(scheme: Scheme) -> str | None:
    """Why this step cannot choose codes on a grid, or None."""
    if isinstance(found.load("grids", scheme.grid), CodebookGrid):
        return None
    return (f"the aqlm step makes codebooks, which {scheme.label} has not; take scheme.grid aqlm-2x8 or aqlm-1x16, or "
            "--method gptq")


def run(layer: Layer, options: Options) -> Layer:
    if layer.stats is None:
        raise NumericalError(f"{layer.name}: AQLM needs calibration statistics and got none")
    grid: Any = found.load("grids", layer.scheme.grid)
    unit = unit_of(layer.target)
    problem, damping, repaired = _problem(layer, layer.target / unit, grid, options, unit)
    state = problem.first()
    solved = problem.in_order(state)
    state = _better(state, solved)
    for done in range(options.rounds):  # noqa: B007
        before = float(state.loss.sum())
        state = problem.sweep(problem.rescaled(problem.refitted(state)))
        if float(state.loss.sum()) >= (1 - options.tolerance) * before:
            break
    if not all_finite(state.values()):
        raise NumericalError(f"{layer.name}: its codebooks are not finite; leave it out with a rule (match: "
                             f"'{layer.name}', skip: true)")
    return layer.having(quantized=problem.answer(state, unit), repaired=repaired,
                        notes={"damping": damping, "codebook_rounds": done + 1 if options.rounds else 0})


def _problem(layer: Layer, target: torch.Tensor, grid: CodebookGrid, options: Options,
             unit: float) -> tuple[Problem, float, dict[str, str]]:
    """Groups are taken in order of their diag(H), the largest first."""
    hessian: torch.Tensor = layer.stats.hessian  # type: ignore[union-attr]
    importance = hessian.diagonal().reshape(-1, VECTOR).sum(1)
    groups = importance.argsort(descending=True, stable=True)
    columns = (groups[:, None] * VECTOR + torch.arange(VECTOR, device=groups.device)).reshape(-1)
    lower, damping, repaired = factor(layer.name, hessian, options.damping, options.damping_mode, columns.flip(0))
    lower = lower.flip(0, 1)  # now upper triangular, its columns in the order in which they are taken
    whole = damped(hessian, damping, options.damping_mode)
    return Problem(grid, options, target, whole, lower, groups, layer.scale_dtype, unit), damping, repaired


@dataclass(frozen=True)
class Problem:
    """target: float32 [N, K].  hessian: float32 [K, K], damped.  feedback: [K, K], U upper triangular with U Uᵀ that
    matrix, rows and columns in the order in which groups are taken.  order: int64 [K / 8], these groups."""

    grid: CodebookGrid
    options: Options
    target: torch.Tensor
    hessian: torch.Tensor
    feedback: torch.Tensor
    order: torch.Tensor
    dtype: torch.dtype
    unit: float

    def first(self) -> State:
        """Residual k-means under the diagonal blocks of H."""
        scale = row_scales(self.target * self.unit, self.dtype)[:, 0].float() / self.unit
        codes, codebooks = start(self.target, scale, blocks_of(self.hessian), self.grid.books, self.grid.words,
                                 self.options.kmeans_rounds, 0)
        return self.state(codes, codebooks, scale)

    def state(self, codes: torch.Tensor, codebooks: torch.Tensor, scale: torch.Tensor) -> State:
        """With codebooks and scales as they will be stored."""
        kind = torch.finfo(self.dtype)
        codebooks = codebooks.clamp(kind.min, kind.max).to(self.dtype).float()
        off = self.target - ops.dequantize_codebooks(codes, codebooks, scale)
        error = off @ self.hessian
        return State(codes, codebooks, scale, error, (off * error).sum(1, dtype=torch.float64))

    def in_order(self, state: State) -> State:
        """Codes of one group after the other, each with the feedback of those before it."""
        columns = (self.order[:, None] * VECTOR + torch.arange(VECTOR, device=self.order.device)).reshape(-1)
        upper = self.feedback.reshape(len(columns), -1, VECTOR)
        places = torch.arange(upper.shape[1], device=columns.device)
        own = upper.reshape(-1, VECTOR, *upper.shape[1:])[places, :, places]  # on the diagonal
        metric = torch.einsum("kgj,gij->kgi", upper, own).reshape(self.feedback.shape)
        off = (self.target - state.values())[:, columns]
        codes = state.codes[:, self.order]
        self._sweep(state, codes, off @ metric, metric)
        found = torch.empty_like(codes)
        found[:, self.order] = codes
        return self.state(found, state.codebooks, state.scale)

    def sweep(self, state: State) -> State:
        """A beam search for each group in turn, the others as they are."""
        codes, error = state.codes.clone(), state.error.clone()
        self._sweep(state, codes, error, self.hessian)
        new = replace(state, codes=codes, error=error)
        off = self.target - new.values()
        return _better(state, replace(new, loss=(off * error).sum(1, dtype=torch.float64)))

    def refitted(self, state: State) -> State:
        """Codebooks by least squares: conjugate gradients with the 8 x 8 blocks of the codewords as preconditioner."""
        words, size = self.grid.words, state.scale[:, None]
        factors = factor_words(curvature(state.codes, state.scale, blocks_of(self.hessian), words))
        codebooks = state.codebooks.clone()
        left = ops.sum_codewords(state.error * size, state.codes, words)
        near = solve_words(factors, left)
        along, power = near.clone(), _dot(left, near)
        first = power
        for _ in range(self.options.iterations):
            if not power > 1e-8 * first:
                break
            moved = ops.dequantize_codebooks(state.codes, along, state.scale) @ self.hessian
            bent = ops.sum_codewords(moved * size, state.codes, words)
            curved = _dot(along, bent)
            if not curved > 0:
                break
            codebooks += (power / curved) * along
            left -= (power / curved) * bent
            near = solve_words(factors, left)
            last, power = power, _dot(left, near)
            along = near + (power / last) * along
        return _better(state, self.state(state.codes, codebooks, state.scale))

    def rescaled(self, state: State) -> State:
        """The least-squares scale of each row, as it will be stored; kept where that helps the row."""
        values = ops.dequantize_codebooks(state.codes, state.codebooks, torch.ones_like(state.scale))
        bent = values @ self.hessian
        slope, curved = (state.error * values).sum(1), (bent * values).sum(1)
        wanted = state.scale + slope / curved.clamp_min(torch.finfo(torch.float32).tiny)
        scale = (wanted * self.unit).to(self.dtype).float() / self.unit
        move = scale - state.scale
        gain = move * (2 * slope - move * curved)
        good = torch.isfinite(scale) & (scale > 0) & (gain > 0)
        move = torch.where(good, move, 0.0)
        return replace(state, scale=torch.where(good, scale, state.scale), error=state.error - move[:, None] * bent,
                       loss=state.loss - torch.where(good, gain, 0.0))

    def answer(self, state: State, unit: float) -> QuantizedTensor:
        scale = (state.scale * unit).to(self.dtype)
        return self.grid.fitted(state.codes, state.codebooks.to(self.dtype), scale[:, None])

    def _sweep(self, state: State, codes: torch.Tensor, error: torch.Tensor, metric: torch.Tensor) -> None:
        """One pass over `codes` [N, K / 8, M]; they and `error`, which is D times the metric, are changed."""
        roots = roots_of(blocks_of(metric))
        for begin in range(0, error.shape[1], BLOCK):
            here = slice(begin, min(begin + BLOCK, error.shape[1]))
            groups = slice(here.start // VECTOR, here.stop // VECTOR)
            codes[:, groups], change = ops.refine_codebooks(
                error[:, here], metric[here, here], codes[:, groups], state.scale, state.codebooks, roots[groups],
                self.options.beam)
            error.addmm_(change, metric[here], alpha=-1)


def _better(old: State, new: State) -> State:
    """The one of less loss."""
    return new if float(new.loss.sum()) < float(old.loss.sum()) else old


def blocks_of(matrix: torch.Tensor) -> torch.Tensor:
    """The 8 x 8 blocks on the diagonal of a matrix [K, K], [K / 8, 8, 8]."""
    places = torch.arange(len(matrix) // VECTOR, device=matrix.device)
    return matrix.reshape(len(places), VECTOR, len(places), VECTOR)[places, :, places]


def _dot(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.double() * other).sum())
