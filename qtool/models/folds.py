"""Scaling the input channels of linears without changing the model: the inverse goes into what feeds them.

The inputs x of some linears come from a norm (x = n(h) * w), or channel by channel from another linear (v_proj through
attention to o_proj, up_proj through the gate to down_proj). Dividing that norm's or linear's weight by s and
multiplying the columns of the linears by s gives the same function. Whether a fold holds is tried on the block, not
looked up: random s, same output. Sources: AWQ (arXiv 2306.00978), SmoothQuant (arXiv 2211.10438).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from qtool.activations import outlier_mask
from qtool.errors import NumericalError
from qtool.layer import Survey
from qtool.models.blocks import BlockArguments
from qtool.models.statistics import InputWatch
from qtool.models.streams import LOOK, StreamStore
from qtool.moments import add_gram, mirror, zeros
from qtool.tensors import all_finite

FEEDS = (("v_proj", "o_proj"), ("up_proj", "down_proj"))  # linears whose channels reach another linear one by one
TOLERANCE = 1e-3  # of the output's size, for a fold that holds
ROUNDED = 16.0  # the same in eps of the element type, for a norm that computes with 1 + weight
ROWS, COLUMNS = "rows", "columns"  # of a weight, that a fold divides or multiplies
Run = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Fold:
    """Linears (paths in the block) that share their input, and the norm or linear that it comes from.

    added: the norm computes with 1 + weight.  repeat, run: each run of `run` channels of a source linear feeds `repeat`
    runs of the consumers one after another (grouped-query attention).
    """

    consumers: tuple[str, ...]
    source: str
    linear: bool
    added: bool = False
    repeat: int = 1
    run: int = 1


@dataclass(frozen=True)
class Scaling:
    """What a fold does to the weight [N, K] of a linear: rows divided by `by` [N], or columns times `by` [K]."""

    linear: str
    axis: str
    by: torch.Tensor

    def of(self, weight: torch.Tensor) -> torch.Tensor:
        """float32 [N, K]."""
        return weight.float() / self.by[:, None] if self.axis == ROWS else weight.float() * self.by


def survey(block: nn.Module, prefix: str, linears: Sequence[str], arguments: BlockArguments, index: int,
           store: StreamStore, batches: Iterable[slice], device: torch.device, dtype: torch.dtype,
           keep: int, threshold: float = 0.0, moments: bool = False) -> dict[tuple[str, ...], Survey]:
    """Run the block on some batches: paths of linears that share an input -> its looks, `keep` tokens of it.

    threshold: of outliers; 0: there are none.  moments: the Hessian too.
    """
    sums: dict[str, list[torch.Tensor]] = {}
    grams: dict[str, torch.Tensor] = {}
    tokens: dict[str, int] = {}

    def measure(name: str, x: torch.Tensor) -> None:
        size, step = x.float().abs(), max(1, len(x) // 64)
        mean, largest, sample = size.sum(0), size.amax(0), x[::step].float()
        outliers = outlier_mask(x.half(), threshold).sum(0, dtype=torch.float64)
        if name in sums:
            mean, largest = mean + sums[name][0], torch.maximum(largest, sums[name][1])
            outliers, sample = outliers + sums[name][2], torch.cat([sums[name][3], sample])
        sums[name], tokens[name] = [mean, largest, outliers, sample[:keep]], tokens.get(name, 0) + len(x)
        if moments:
            add_gram(grams.setdefault(name, zeros(x.shape[1], x.device)), x)

    watch = InputWatch(block, prefix, linears, measure)
    try:
        with torch.inference_mode():
            for batch in batches:
                watch.run(block, arguments, index, store, batch, device, dtype)
    finally:
        watch.remove()
    groups: dict[str, list[str]] = {}
    for name in linears:
        if name in watch.leaders:
            groups.setdefault(watch.leaders[name], []).append(name.removeprefix(prefix + "."))
    found = {}
    for leader, names in groups.items():
        if leader in sums:
            mean, largest, outliers, sample = sums[leader]
            if not all_finite(mean):
                raise NumericalError(f"{leader}: its inputs on calibration text are not finite, though what enters the "
                                     f"block is: a weight before it is too large; {LOOK[False]}")
            hessian = mirror(grams[leader]) / tokens[leader] if moments else None
            found[tuple(names)] = Survey(mean / tokens[leader], largest, outliers / tokens[leader], sample, hessian)
    return found


def find_folds(block: nn.Module, groups: Iterable[tuple[str, ...]], run: Run) -> tuple[list[Fold], bool]:
    """Of the groups of linears that share an input, those with a source that can be scaled. Changes nothing.

    Also whether the block could tell: linears that do nothing here (of zeros, say) are left out.
    """
    groups = list(groups)
    feeding = _norms(block, groups, run)
    found = []
    expected = run()
    felt = [group for group in groups if _felt(block, group, run, expected)]
    for group in felt:
        tried = [Fold(group, feeding[group], False, added) for added in (False, True)] if group in feeding else []
        for fold in (*tried, *_linear_folds(block, group)):
            if _holds(block, fold, run, expected):
                found.append(fold)
                break
    return found, len(felt) == len(groups)


def apply(block: nn.Module, fold: Fold, scale: torch.Tensor, read: Callable[[str], torch.Tensor],
          norm_dtype: torch.dtype) -> tuple[dict[str, torch.Tensor], list[Scaling]]:
    """Multiply the columns of the consumers by scale [K], divide their source by it; parameters by path in the block,
    and what was done to the linears.

    read: the exact parameter at a path. The norm is rounded to norm_dtype first and the consumers follow what it really
    became, so that nothing is lost. The block's own parameters are changed too.
    """
    changed: dict[str, torch.Tensor] = {}
    done: list[Scaling] = []
    if fold.linear:
        done = [Scaling(fold.source, ROWS, _source_scale(fold, scale))]
        rows = done[0].by
        changed[f"{fold.source}.weight"] = done[0].of(read(f"{fold.source}.weight"))
        if _linear(block, fold.source).bias is not None:
            bias = read(f"{fold.source}.bias")
            changed[f"{fold.source}.bias"] = (bias.float() / rows).to(bias.dtype)
    else:
        one = 1.0 if fold.added else 0.0
        before = read(f"{fold.source}.weight").float()
        after = ((before + one) / scale - one).to(norm_dtype)
        real = (before + one) / (after.float() + one)
        scale = torch.where(torch.isfinite(real) & (real > 0), real, 1.0)
        changed[f"{fold.source}.weight"] = torch.where(scale == 1, before.to(norm_dtype), after)
    done += [Scaling(path, COLUMNS, scale) for path in fold.consumers]
    for scaling in done[-len(fold.consumers):]:
        changed[f"{scaling.linear}.weight"] = scaling.of(read(f"{scaling.linear}.weight"))
    for path, tensor in changed.items():
        block.get_parameter(path).data.copy_(tensor)
    return changed, done


def source_shape(fold: Fold, columns: int) -> torch.Size:
    """A scale [K] must be constant over these, and is averaged there: [runs, repeat, run] of the K channels."""
    return torch.Size((columns // (fold.repeat * fold.run), fold.repeat, fold.run))


def tied(fold: Fold, values: torch.Tensor) -> torch.Tensor:
    """values [K] averaged over the channels that must have the same scale."""
    if fold.repeat == 1:
        return values
    return values.reshape(source_shape(fold, len(values))).mean(1, keepdim=True).expand(
        source_shape(fold, len(values))).reshape(-1)


def tied_survey(fold: Fold, look: Survey) -> Survey:
    """With means that are the same where scales must be."""
    tie = functools.partial(tied, fold)
    return replace(look, mean=tie(look.mean), largest=tie(look.largest), tie=tie)


def _source_scale(fold: Fold, scale: torch.Tensor) -> torch.Tensor:
    """The scale of each row of a source linear."""
    return scale if fold.repeat == 1 else scale.reshape(source_shape(fold, len(scale)))[:, 0].reshape(-1)


def _norms(block: nn.Module, groups: list[tuple[str, ...]], run: Run) -> dict[tuple[str, ...], str]:
    """Group -> the module with a one-dimensional weight whose output is the very input of its linears."""
    outputs: dict[int, tuple[str, torch.Tensor]] = {}
    found: dict[tuple[str, ...], str] = {}

    def leaves(path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: object, output: object) -> None:
            if isinstance(output, torch.Tensor):
                outputs[output.data_ptr()] = path, output  # kept, so that no later tensor has its address
        return hook

    def enters(group: tuple[str, ...]) -> Callable[..., None]:
        def hook(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            path, output = outputs.get(inputs[0].data_ptr(), ("", inputs[0]))
            if path and output.shape == inputs[0].shape:
                found[group] = path
        return hook

    vectors = {path for path, module in block.named_modules() for name, one in module.named_parameters(recurse=False)
               if name == "weight" and one.dim() == 1}
    handles = [block.get_submodule(path).register_forward_hook(leaves(path)) for path in sorted(vectors)]
    handles += [block.get_submodule(group[0]).register_forward_pre_hook(enters(group)) for group in groups]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return found


def _linear_folds(block: nn.Module, group: tuple[str, ...]) -> Iterable[Fold]:
    parent, _, last = group[0].rpartition(".")
    for source, target in FEEDS:
        path = f"{parent}.{source}" if parent else source
        if len(group) != 1 or last != target or path not in dict(block.named_modules()):
            continue
        rows, columns = _linear(block, path).out_features, _linear(block, group[0]).in_features
        if columns % rows:
            continue
        head = getattr(block.get_submodule(parent), "head_dim", rows)
        width = int(head) if columns != rows and isinstance(head, int) else 1
        if rows % width == 0:
            yield Fold(group, path, True, repeat=columns // rows, run=width)


def _linear(block: nn.Module, path: str) -> nn.Linear:
    module = block.get_submodule(path)
    assert isinstance(module, nn.Linear)
    return module


def _felt(block: nn.Module, group: tuple[str, ...], run: Run, expected: torch.Tensor) -> bool:
    """Whether the output of the block depends on these linears at all; if not, any fold of them would seem to hold."""
    scale = _trial_scale(torch.Size((_linear(block, group[0]).in_features, 1, 1)), expected.device)
    with replaced(block, {f"{path}.weight": block.get_parameter(f"{path}.weight").data * scale for path in group}):
        return not torch.equal(run(), expected)


def _trial_scale(shape: torch.Size, device: torch.device) -> torch.Tensor:
    """2 or 1/2 for each source channel, [K] of a source_shape: exact in every element type, so an output that changes
    tells of a fold that does not hold, not of rounding."""
    powers = torch.randint(2, (shape[0], 1, shape[2]), generator=torch.Generator().manual_seed(0)) * 2 - 1
    return (2.0**powers).expand(shape).reshape(-1).to(device)


def _holds(block: nn.Module, fold: Fold, run: Run, expected: torch.Tensor) -> bool:
    paths = [f"{fold.source}.weight", *(f"{path}.weight" for path in fold.consumers)]
    if fold.linear and _linear(block, fold.source).bias is not None:
        paths.append(f"{fold.source}.bias")
    scale = _trial_scale(source_shape(fold, _linear(block, fold.consumers[0]).in_features), expected.device)
    with replaced(block, {path: block.get_parameter(path).data.clone() for path in paths}) as before:
        dtype = before[paths[0]].dtype
        apply(block, fold, scale, before.__getitem__, dtype)
        off = (run() - expected).abs().max()
    tolerance = max(TOLERANCE, ROUNDED * torch.finfo(dtype).eps if fold.added else 0.0)  # 1 + weight / 2 is not exact
    return bool(off <= tolerance * expected.float().std())


@contextlib.contextmanager
def replaced(block: nn.Module, values: Mapping[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """For a while these parameters (by path) have other values; gives what they were."""
    before = {path: block.get_parameter(path).data.clone() for path in values}
    try:
        for path, value in values.items():
            block.get_parameter(path).data.copy_(value)
        yield before
    finally:
        for path, tensor in before.items():
            block.get_parameter(path).data.copy_(tensor)
