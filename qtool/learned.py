"""What a manifest tells of learning, in few words (the steps tune and distill)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def blocks(layers: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Of the step tune: how many blocks there are and how many became better, and the median ratio of the loss after
    all of its steps to that before; None where no block learned."""
    found = {layer["block"]: layer["tuned"] for layer in layers if layer.get("tuned")}
    if not found:
        return None
    ratios = sorted(steps[-1]["loss_after"] / max(steps[0]["loss_before"], 1e-30) for steps in found.values())
    better = sum(any(step["kept_step"] for step in steps) for steps in found.values())
    return {"blocks": len(found), "better": better, "loss_ratio": round(ratios[len(ratios) // 2], 6)}


def divergence(learned: Mapping[str, Any] | None) -> tuple[float, float] | None:
    """Of the step distill: KL to the original on held-out text, in nats per token, before and after."""
    if not learned or not learned["curve"]:
        return None
    losses = [point["held_out"] for point in learned["curve"]]
    return losses[0], min(losses)


def sentences(layers: Sequence[Mapping[str, Any]], learned: Mapping[str, Any] | None) -> list[str]:
    """For people."""
    return told_of({"tuned": blocks(layers), "distilled": learned})


def told_of(summary: Mapping[str, Any] | None) -> list[str]:
    """The same of what a summary has (inspect.summary)."""
    told: list[str] = []
    if summary is None:
        return told
    known, learned = summary["tuned"], summary["distilled"]
    ends = divergence(learned)
    if known:
        told.append(f"{known['better']} of {known['blocks']} blocks became better, their loss by "
                    f"{100 * (1 - known['loss_ratio']):.1f} % (median)")
    if ends and learned:
        told.append(f"divergence on held-out text {ends[0]:.4g} → {ends[1]:.4g} nats per token, step "
                    f"{learned['kept_step']} of {learned['steps']}")
    return told
