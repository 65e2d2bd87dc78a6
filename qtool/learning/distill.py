"""The step distill of a run: from the files of solved blocks to learned numbers, and back into the files.

Only OUT.partial/ is needed: codes and scales are read from the files that the blocks were written to, and written at
the same places when learning has ended. The state, `distill-STEP.bin`, is durable at every check, and the journal tells
which one counts; so a killed run loses what came after the last check.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from qtool import found, quality, records
from qtool.container import Writer
from qtool.learning import weights, whole
from qtool.models import blocks
from qtool.models.calibration import CalibrationTokens
from qtool.models.streams import StreamStore
from qtool.packing import write_linear
from qtool.plan import Plan
from qtool.stages import LinearPlan, Stage
from qtool.stream import Stream
from qtool.tensors import FLOATING, QuantizedTensor
from qtool.workspace import Workspace

STAGE, LEARNED = "distill", "learned"
Tell = Callable[[str], None]


@dataclass
class Learner:
    """What is learned of one stage of the plan: a block, or what follows the blocks.

    original: reads the unquantized model.  options: the step's.  keep: whether what it begins with stays in memory.
    """

    plan: Plan
    stage: Stage
    writer: Writer
    original: blocks.Read
    options: Any
    keep: bool
    _begin: weights.Start | None = None

    def begin(self) -> weights.Start:
        if self._begin is not None:
            return self._begin
        tensors = {self.path(one): self.quantized(one) for one in self.stage.linears}
        originals = {self.path(one): self.original(one.stored + ".weight").float() for one in self.stage.linears
                     if self.options.rounding == "weights"}
        made = weights.start(tensors, {path: self.read(name) for path, name in self.gains().items()}, originals)
        if self.keep:
            self._begin = made
        return made

    def read(self, name: str) -> torch.Tensor:
        return self.writer.read_back(name)

    def quantized(self, linear: LinearPlan) -> QuantizedTensor:
        tensor: QuantizedTensor = self.plan.format.unpack(linear.stored, self.writer.read_back, linear.scheme,
                                                          linear.shape)
        return tensor.to(self.plan.device)

    def path(self, linear: LinearPlan) -> str:
        """In the block."""
        return linear.name.removeprefix(self._prefix()) + ".weight"

    def gains(self) -> dict[str, str]:
        """Parameters of one value per channel: path (in the block, or the model) -> stored name."""
        if not self.options.gains:
            return {}
        specs = {spec.name: spec for spec in self.stage.outputs}
        copied = {name for name in self.stage.copied if len(specs[name].shape) == 1 and specs[name].dtype in FLOATING}
        bones, prefix = self.plan.skeleton, self._prefix()
        return {path.removeprefix(prefix): bones.source(path) for path in bones.parameters
                if path.startswith(prefix) and bones.source(path) in copied}

    def shapes(self) -> dict[str, torch.Size]:
        return {name: move.shape for name, move in weights.moves(self.begin(), self.options.scales).items()}

    def _prefix(self) -> str:
        return "" if self.stage.block is None else self.plan.skeleton.blocks[self.stage.block] + "."


def distill(plan: Plan, read: blocks.Read, writer: Writer, tokens: CalibrationTokens, stream: Stream, work: Workspace,
            tell: Tell) -> None:
    """Learn, write what was learned, record it. stream: at the exit of the last block. Raises NumericalError."""
    options = plan.distilling
    stages = [stage for stage in plan.stages if stage.block is not None]
    budget = int(plan.recipe.memory_budget_gb * 1e9)
    held = sum(one.shape[0] * one.shape[1] for stage in stages for one in stage.linears)
    keep = held * (5 if options.rounding == "weights" else 1) <= budget // 2
    learners = [Learner(plan, stage, writer, read, options, keep) for stage in (*stages, plan.stages[-1])]
    shelf = whole.Shelf([one.shapes() for one in learners], work.folder, budget // 4)
    progress = _resume(work, shelf)
    chain = whole.Chain(_setting(plan, read, tokens, stream, options, budget // 4), learners, shelf,
                        {path: path for path in learners[-1].gains()})

    def save(now: whole.Progress) -> None:
        path = work.folder / f"{STAGE}-{now.step}.bin"
        shelf.store.save(path)
        work.record(STAGE, {"progress": asdict(now)})
        for old in work.folder.glob(f"{STAGE}-*"):
            if old != path:
                old.unlink()

    progress = whole.learn(chain, progress, options, save, tell)
    tell(f"divergence on held-out text {progress.curve[0][2]:.5f} -> {progress.best:.5f}; writing what was learned")
    changed = [record for part, one in enumerate(learners)
               for record in write(one, shelf.views(part, shelf.rows(part)[whole.BEST]))]
    writer.sync()
    work.record(STAGE, {"layers": changed, LEARNED: {
        "loss": "kl", "steps": progress.step, "kept_step": progress.best_step, "tokens": progress.tokens,
        "curve": [{"step": step, "fitting": records.short(fitting), "held_out": records.short(held)}
                  for step, fitting, held in progress.curve]}})
    distilled(work)


def distilled(work: Workspace) -> bool:
    """Whether learning has ended and been recorded; then what it was done with is removed."""
    ended = LEARNED in work.finished.get(STAGE, {})
    for path in [*work.folder.glob(f"{STAGE}-*"), *work.folder.glob("stream-*")] if ended else ():
        path.unlink()
    return ended


def after_distilling(work: Workspace,
                     layers: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """What the manifest tells of linears, with what learning changed of it; and of the learning, if there was any."""
    told = work.finished.get(STAGE, {})
    changed = {record["name"]: record for record in told.get("layers", ())}
    return [{**record, **changed.get(record["name"], {})} for record in layers], told.get(LEARNED)


def write(learner: Learner, moves: Mapping[str, torch.Tensor]) -> list[dict[str, Any]]:
    """Put what was learned of one stage into the files; of each linear, what the manifest tells now."""
    plan, made = learner.plan, []
    tensors, gains = weights.answer(learner.begin(), dict(moves))
    for path, name in learner.gains().items():
        learner.writer.write(name, gains[path].cpu())
    for linear in learner.stage.linears:
        tensor = tensors[learner.path(linear)].to(torch.device("cpu"))
        dense = found.load("grids", tensor.grid).decode(tensor)
        digest = write_linear(plan, learner.writer, linear, tensor, dense)
        weight = learner.original(linear.stored + ".weight").float().cpu()
        error = quality.weight_error(weight, weight - dense)
        made.append({"name": linear.name, "values_sha256": digest, "relative_error": None,
                     "weight_error": records.short(error), "sqnr_db": records.short(quality.sqnr_db(error))})
    return made


def _resume(work: Workspace, shelf: whole.Shelf) -> whole.Progress:
    known = work.finished.get(STAGE, {}).get("progress")
    if known is None:
        return whole.Progress()
    progress = whole.Progress(**{**known, "curve": [tuple(one) for one in known["curve"]]})
    shelf.store.load(work.folder / f"{STAGE}-{progress.step}.bin")
    return progress


def _setting(plan: Plan, read: blocks.Read, tokens: CalibrationTokens, stream: Stream, options: Any,
             budget: int) -> whole.Setting:
    """The entrances come from the embeddings again: they are cheaper to compute than to keep."""
    samples, length = tokens.ids.shape
    entrance = StreamStore(samples, length, plan.skeleton.hidden, plan.model_dtype, budget, stream.folder)
    blocks.capture(plan.skeleton, read, tokens.ids, entrance, plan.device, plan.compute_dtype, stream.batches)
    fitting, held = stream.learning_batches(1.0)
    size = max(1, options.tokens // (length * (fitting[0].stop - fitting[0].start)))
    return whole.Setting(plan.skeleton, tokens.ids, entrance, stream.stores[1], stream.arguments, fitting, held, size,
                         read, plan.device, plan.compute_dtype, stream.folder, budget)
