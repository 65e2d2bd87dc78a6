"""Expert layers as checkpoints hold them: one linear per expert and projection.

transformers 5 fuses the experts of a layer into `gate_up_proj` [E, 2I, H] and `down_proj` [E, H, I]; quantization needs
each expert's matrices, inputs and error by themselves.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from qtool.errors import ModelError


class ExpertLinear(nn.Linear):
    """A linear that is not initialised: a model may have tens of thousands, and each initialisation costs 0.1 ms."""

    def reset_parameters(self) -> None:
        pass


class SplitExperts(nn.Module):
    """E gated experts, `<index>.<gate|up|down>`, computing what transformers' fused module computes."""

    def __init__(self, count: int, hidden: int, intermediate: int, names: tuple[str, str, str],
                 activation: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        self.count = count
        self.names = names
        self.activation = activation
        for index in range(count):
            expert = nn.Module()
            for name, columns, rows in zip(names, (hidden, hidden, intermediate),
                                           (intermediate, intermediate, hidden), strict=True):
                expert.add_module(name, ExpertLinear(columns, rows, bias=False, device="meta", dtype=dtype))
            self.add_module(str(index), expert)

    def forward(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor,
                top_k_weights: torch.Tensor) -> torch.Tensor:
        """hidden_states [T, H], top_k_index int64 [T, k], top_k_weights [T, k] -> [T, H]."""
        output = torch.zeros_like(hidden_states)
        gate_name, up_name, down_name = self.names
        for index in torch.unique(top_k_index).tolist():
            if index >= self.count:  # some routers mark a dropped token with the number of experts
                continue
            expert = self.get_submodule(str(index))
            token, position = torch.where(top_k_index == index)
            routed = hidden_states[token]
            gate = expert.get_submodule(gate_name)(routed)
            inner = self.activation(gate) * expert.get_submodule(up_name)(routed)
            result = expert.get_submodule(down_name)(inner) * top_k_weights[token, position, None]
            output.index_add_(0, token, result.to(output.dtype))
        return output


def is_fused(module: nn.Module) -> bool:
    """Whether a module holds the experts of a layer as 3-D parameters."""
    return (not isinstance(module, (nn.Conv1d, nn.Embedding))
            and any(parameter.dim() == 3 for parameter in module.parameters(recurse=False)))


def split(model: nn.Module, names: tuple[str, str, str]) -> list[str]:
    """Replace every fused expert module of a meta model; returns their paths. Raises ModelError for unusual experts."""
    paths = [path for path, module in model.named_modules() if is_fused(module)]
    for path in paths:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, _split_one(path, model.get_submodule(path), names))
    return paths


def _split_one(path: str, fused: nn.Module, names: tuple[str, str, str]) -> SplitExperts:
    shapes = {name: tuple(parameter.shape) for name, parameter in fused.named_parameters(recurse=False)}
    usual = set(shapes) == {"gate_up_proj", "down_proj"} and not list(fused.buffers(recurse=False))
    if not usual or not _plain_gate(fused):
        raise ModelError(f"{path}: experts of the kind {type(fused).__name__} ({_describe(shapes)}) are not supported; "
                         "supported are gated experts without biases, as in Mixtral, Qwen3-MoE and DeepSeek-V3")
    count, hidden, intermediate = shapes["down_proj"]
    if shapes["gate_up_proj"] != (count, 2 * intermediate, hidden):
        raise ModelError(f"{path}: gate_up_proj [E, 2I, H] does not fit down_proj [E, H, I]: {_describe(shapes)}")
    return SplitExperts(count, hidden, intermediate, names, fused.act_fn, fused.down_proj.dtype)  # type: ignore[arg-type]


def _plain_gate(fused: nn.Module) -> bool:
    """act(gate) * up with gate and up concatenated; classes that say otherwise do so in these attributes."""
    gate = getattr(type(fused), "_apply_gate", None)
    return (callable(getattr(fused, "act_fn", None))
            and getattr(gate, "__name__", "") == "_default_apply_gate"
            and getattr(fused, "has_gate", True) and getattr(fused, "is_concatenated", True)
            and not getattr(fused, "is_transposed", False) and not getattr(fused, "has_bias", False)
            and not getattr(fused, "has_post_expert_norm", False))


def _describe(shapes: dict[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
