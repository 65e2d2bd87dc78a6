"""Rotations folded into the weights of a model, which computes what it did: R1 of the residual stream, R2 of heads.

The stream h becomes h R1. An RMS norm commutes with that once its gain g lies in the linears that read from it, which
become W diag(g) R1; what writes to the stream becomes R1^T W, the embedding E R1, the head W diag(g) R1. Between v_proj
and o_proj each head's values become v R2; one R2 serves all heads, so key-value heads may be shared by query heads.
Which parameters read and write is watched on a block with random weights, then tried: the rotated block on h R1 must
give the old output times R1. Sources: QuaRot (arXiv 2404.00456), SpinQuant (arXiv 2405.16406); offline rotations only.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from qtool.errors import ModelError
from qtool.hadamard import Rotation, rotation
from qtool.models.blocks import BlockArguments, Read, capture, fill, load_block
from qtool.models.changes import Change, apply, in_block, pattern
from qtool.models.skeleton import Skeleton
from qtool.models.streams import StreamStore

CPU = torch.device("cpu")
TOKENS = (2, 8)  # samples and tokens of a trial
TOLERANCE = 1e-3  # of the output's size; float32 rounding stays far below it
WITHOUT_HEADS = "use --set steps.rotate.heads=false"
WITHOUT_RESIDUAL = "--set steps.rotate.residual=false rotates the heads alone; or use a recipe without rotate"
NO_RMS_NORM = "is no RMS norm (one that takes the mean off does not commute with a rotation)"


@dataclass(frozen=True)
class Rotated:
    """skeleton: with an output head of its own where that was tied.  changes: by tensor name.

    residual, heads: R1, and R2 for each width of heads.  untied: tensors that the checkpoint does not have.
    """

    skeleton: Skeleton
    changes: dict[str, Change]
    residual: Rotation | None
    heads: tuple[Rotation, ...]
    untied: tuple[str, ...] = ()


def find(skeleton: Skeleton, residual: bool, heads: bool, untie: bool, seed: int) -> Rotated:
    """How every tensor changes, tried on one block of each make. Reads no weights; raises ModelError with a reason."""
    trial = Trial.prepare(skeleton, residual, seed)
    makes: dict[str, dict[str, Change]] = {}
    changes: dict[str, Change] = {}
    for index, prefix in enumerate(skeleton.blocks):
        make = repr(skeleton.model.get_submodule(prefix))
        if make not in makes:
            makes[make] = trial.study(index, heads)
        changes |= in_block(skeleton, index, makes[make])
    if heads and not trial.turns:
        raise ModelError(f"{skeleton.model_type}: no block has a v_proj whose heads reach an o_proj, so the heads "
                         f"cannot be rotated; {WITHOUT_HEADS}")
    untied: tuple[str, ...] = ()
    if residual:
        skeleton, untied = _untied(skeleton, untie)
        changes |= trial.outside(skeleton)
    return Rotated(skeleton, changes, trial.residual, tuple(trial.turns.values()), untied)


@dataclass(frozen=True)
class Trial:
    """Blocks with random weights, run on random hidden states float32 [2, 8, H].

    embedded: what the first block received for one and the same token.  turns: R2 by its size.
    """

    skeleton: Skeleton
    seed: int
    residual: Rotation | None
    read: Read
    hidden: torch.Tensor
    embedded: torch.Tensor
    arguments: BlockArguments
    turns: dict[int, Rotation]

    @classmethod
    def prepare(cls, skeleton: Skeleton, residual: bool, seed: int) -> Trial:
        read = _random(skeleton)
        store = StreamStore(*TOKENS, skeleton.hidden, torch.float32, 1 << 40)
        batch = slice(0, TOKENS[0])
        arguments = capture(skeleton, read, torch.zeros(TOKENS, dtype=torch.int64), store, CPU, torch.float32, [batch])
        hidden = torch.randn(*TOKENS, skeleton.hidden, generator=torch.Generator().manual_seed(0))
        return cls(skeleton, seed, rotation(skeleton.hidden, seed) if residual else None, read, hidden,
                   store.read(batch), arguments, {})

    def study(self, index: int, heads: bool) -> dict[str, Change]:
        """The changes of one block by parameter path (all experts as one, names as in the model), tried."""
        block = self._load(index, self.read)
        readers, expected = _watch(block, self.hidden, partial(self._run, block, index, self.hidden))
        changes = self._changes(block, readers, heads)
        plain = self._changes(block, readers, False)
        del block
        if self._off(index, changes, expected) <= TOLERANCE:
            return changes
        where = f"{self.skeleton.model_type} cannot be rotated: in {self.skeleton.blocks[index]}, "
        if heads and self._off(index, plain, expected) <= TOLERANCE:
            raise ModelError(f"{where}something comes between the heads of v_proj and o_proj; {WITHOUT_HEADS}")
        what = self._reason(self._load(index, self.read), set(readers.values()))
        raise ModelError(f"{where}{what}; {WITHOUT_RESIDUAL}")

    def outside(self, bones: Skeleton) -> dict[str, Change]:
        """The changes of the embedding, the last norm and the output head (untied in `bones`). Raises ModelError."""
        table, head = bones.embeddings[0], f"{bones.head}.weight"
        row = self.read(bones.source(table))[0]
        along = (self.embedded @ row / (row @ row))[..., None] * row
        inside = tuple(f"{prefix}." for prefix in (*bones.blocks, str(bones.head)))
        rest = [name for name in bones.parameters if not name.startswith(inside) and name != table]
        if (bones.head is None or len(rest) != 1 or bones.parameters[rest[0]] != (bones.hidden,)
                or not _near(self.embedded, along)):
            raise ModelError(f"{bones.model_type} cannot be rotated: outside its blocks it has more than an embedding, "
                             f"a norm and an output head ({', '.join(rest[:4])}); {WITHOUT_RESIDUAL}")
        path = rest[0].rpartition(".")[0]
        norm = copy.deepcopy(bones.model.get_submodule(path))
        fill(bones, norm, path + ".", self.read, CPU, torch.float32)
        added, gain = _added(norm, self.hidden), bones.source(rest[0])
        if not self._commutes(norm):
            raise ModelError(f"{bones.model_type} cannot be rotated: {path} {NO_RMS_NORM}; {WITHOUT_RESIDUAL}")
        shared = table if head not in self.skeleton.parameters else head
        return {bones.source(table): Change(bones.source(table), columns=self.residual),
                gain: Change(gain, constant=1 - added),
                bones.source(head): Change(bones.source(shared), columns=self.residual, gain=gain, added=added)}

    def _changes(self, block: nn.Module, readers: dict[str, str], heads: bool) -> dict[str, Change]:
        changes: dict[str, Change] = {}

        def change(path: str, **what: Any) -> None:
            changes[path] = replace(changes.get(path, Change(path)), **what)

        if self.residual is not None:
            added = {norm: _added(block.get_submodule(norm), self.hidden) for norm in set(readers.values())}
            for norm, one in added.items():
                change(f"{norm}.weight", constant=1 - one)
            for path, norm in readers.items():
                change(f"{path}.weight", columns=self.residual, gain=f"{norm}.weight", added=added[norm])
            for path, linear in _linears(block):
                if linear.out_features == self.skeleton.hidden and path not in readers:
                    change(f"{path}.weight", rows=self.residual)
                    change(f"{path}.bias", columns=self.residual)
        for values, output, width in _head_pairs(block) if heads else ():
            turn = self.turns.setdefault(width, rotation(width, self.seed))
            change(f"{values}.weight", rows=turn)
            change(f"{values}.bias", columns=turn)
            change(f"{output}.weight", columns=turn)
        return changes

    def _off(self, index: int, changes: dict[str, Change], expected: torch.Tensor) -> float:
        """How far the rotated block is from the rotated output, in terms of its size."""
        named = in_block(self.skeleton, index, changes)
        block = self._load(index, lambda name: apply(named[name], self.read) if name in named else self.read(name))
        wanted = self._turned(expected)
        return float((self._run(block, index, self._turned(self.hidden)) - wanted).abs().max() / wanted.std())

    def _reason(self, block: nn.Module, norms: set[str]) -> str:
        """Why the residual stream of a block cannot be rotated."""
        wide = {path: part for path, part in block.named_modules() if _is_vector(part, self.skeleton.hidden)}
        for path in sorted(wide, key=lambda path: (path.count("."), path)):
            if not self._commutes(wide[path]):
                return f"{path} {NO_RMS_NORM}"
            if path not in norms:
                return (f"{path} has a gain that no linear reads: a norm whose output goes into the residual stream (a "
                        "post-norm) cannot be folded")
        return "attention or MLP read or write the residual stream in a way that is not known"

    def _commutes(self, norm: nn.Module) -> bool:
        """Whether a norm without its gain does the same to h R as to h. Its weight is lost."""
        assert isinstance(norm.weight, nn.Parameter)
        norm.weight.data.fill_(1 - _added(norm, self.hidden))
        with torch.no_grad():
            return _near(norm(self._turned(self.hidden)), self._turned(norm(self.hidden)))

    def _turned(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.residual is None else self.residual.turn(x.double()).float()

    def _load(self, index: int, read: Read) -> nn.Module:
        """A block whose experts are all the first one: only what is computed matters here, and memory."""
        shared: dict[str, torch.Tensor] = {}

        def once(name: str) -> torch.Tensor:
            key = pattern(name)
            if key not in shared:
                shared[key] = read(name)
            return shared[key]

        return load_block(self.skeleton, index, once, CPU, torch.float32)

    def _run(self, block: nn.Module, index: int, hidden: torch.Tensor) -> torch.Tensor:
        args, kwargs = self.arguments.for_block(index, len(hidden))
        with torch.no_grad():
            output = block(hidden.clone(), *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output


def _watch(block: nn.Module, hidden: torch.Tensor,
           run: Callable[[], torch.Tensor]) -> tuple[dict[str, str], torch.Tensor]:
    """Path of what multiplies by a matrix [N, H] -> the norm whose output rows it receives; and the block's output.

    By value, not by identity: experts and routers receive copies of some rows.
    """
    width = hidden.shape[-1]
    outputs: dict[str, torch.Tensor] = {}
    readers: dict[str, str] = {}

    def leaves(path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: object, output: torch.Tensor) -> None:
            outputs[path] = output.reshape(-1, width)
        return hook

    def enters(path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            rows = inputs[0].reshape(-1, width) if inputs else torch.empty(0, width)
            for norm, given in outputs.items():
                if len(rows) and bool((rows[:, None] == given).all(-1).any(1).all()):
                    readers[pattern(path)] = norm
        return hook

    handles = []
    for path, part in block.named_modules():
        weight = getattr(part, "weight", None)
        if _is_vector(part, width):
            handles.append(part.register_forward_hook(leaves(path)))
        elif isinstance(weight, nn.Parameter) and weight.dim() == 2 and weight.shape[1] == width:
            handles.append(part.register_forward_pre_hook(enters(path)))
    try:
        return readers, run()
    finally:
        for handle in handles:
            handle.remove()


def _untied(bones: Skeleton, untie: bool) -> tuple[Skeleton, tuple[str, ...]]:
    """With a tensor of its own for the output head, and the names of new tensors. Raises ModelError if not wanted."""
    if not bones.tied:
        return bones, ()
    (alias, shared), *others = bones.tied.items()
    if others or shared != bones.embeddings[0]:
        raise ModelError(f"{bones.model_type} cannot be rotated: {', '.join(bones.tied)} share tensors; "
                         f"{WITHOUT_RESIDUAL}")
    rows, columns = bones.parameters[shared]
    if not untie:
        raise ModelError(f"{bones.model_type} cannot be rotated as it is: the output head shares the embedding's "
                         "tensor, and only the head can take the gain of the norm before it; --set "
                         "steps.rotate.untie=true writes it as a tensor of its own "
                         f"({rows * columns / 1e6:.1f} million weights more)")
    bones = replace(bones, tied={}, head=alias.removesuffix(".weight"),
                    parameters={**bones.parameters, alias: bones.parameters[shared]})
    return bones, (bones.source(alias),)


def _random(skeleton: Skeleton) -> Read:
    """Weights to try with, the same in every run. All tokens have one embedding, so that the table takes no memory."""
    shapes = {skeleton.source(name): shape for name, shape in skeleton.parameters.items()}
    tables = {skeleton.source(name) for name in skeleton.embeddings}

    def read(name: str) -> torch.Tensor:
        shape, generator = shapes[name], torch.Generator().manual_seed(zlib.crc32(name.encode()))
        if name in tables:
            return torch.randn(shape[1], generator=generator).expand(shape)
        if len(shape) < 2:
            return torch.rand(shape, generator=generator) + 0.5
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5
    return read


def _linears(block: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    for path, part in block.named_modules():
        if isinstance(part, nn.Linear):
            yield pattern(path), part


def _head_pairs(block: nn.Module) -> Iterator[tuple[str, str, int]]:
    """Paths of v_proj and o_proj side by side, and how wide a head is."""
    for path, part in block.named_modules():
        values, output, width = (getattr(part, name, None) for name in ("v_proj", "o_proj", "head_dim"))
        if (isinstance(values, nn.Linear) and isinstance(output, nn.Linear) and isinstance(width, int)
                and values.out_features % width == 0 and output.in_features % width == 0):
            yield f"{path}.v_proj", f"{path}.o_proj", width


def _is_vector(part: nn.Module, width: int) -> bool:
    """Whether a module has a gain for each channel of the stream."""
    weight = getattr(part, "weight", None)
    return isinstance(weight, nn.Parameter) and tuple(weight.shape) == (width,)


def _added(norm: nn.Module, hidden: torch.Tensor) -> float:
    """1 for a norm that computes with 1 + weight, else 0."""
    weight = norm.weight
    assert isinstance(weight, nn.Parameter)
    saved = weight.data.clone()
    weight.data.zero_()
    with torch.no_grad():
        output = norm(hidden)
    weight.data.copy_(saved)
    return 1.0 if bool(output.any()) else 0.0


def _near(left: torch.Tensor, right: torch.Tensor) -> bool:
    return bool((left - right).abs().max() <= TOLERANCE * right.std())
