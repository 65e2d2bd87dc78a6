"""One linear into the files of an output, and back: what was written is decoded and held against what was meant."""

from __future__ import annotations

import torch

from qtool import digests, found
from qtool.container import Writer
from qtool.errors import VerificationError
from qtool.plan import Plan
from qtool.stages import LinearPlan
from qtool.tensors import QuantizedTensor


def write_linear(plan: Plan, writer: Writer, linear: LinearPlan, quantized: QuantizedTensor,
                 dense: torch.Tensor) -> str:
    """Pack and write one linear, then decode what the files really have; its digest.

    dense: float32 [N, K], what the codes decode to. Raises VerificationError.
    """
    here = torch.device("cpu")
    for name, tensor in plan.format.pack(linear.stored, quantized.to(here), plan.model_dtype).items():
        writer.write(name, tensor)
    stored = plan.format.unpack(linear.stored, writer.read_back, linear.scheme, linear.shape)
    again: torch.Tensor = found.load("grids", linear.scheme.grid).decode(stored)
    if not torch.equal(again, dense.to(here)):
        raise VerificationError(f"{linear.stored}: what was read back from {writer.folder} differs from what was "
                                "written; the disk or the memory of this machine may be faulty")
    return digests.of_values(again)
