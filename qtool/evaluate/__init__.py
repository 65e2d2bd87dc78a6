"""How good a checkpoint is on text: perplexity, and how far its predictions are from those of a reference.

Text is cut in order into windows that do not overlap; every window is run by itself. A window of T tokens gives T - 1
predictions (of its tokens 2 .. T), and every figure is over exactly these: perplexity = exp(mean negative log
likelihood); KL divergence of the reference's next-token distribution from the quantized model's; how often both
find the same token most likely. Logits and everything after them are float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from qtool import footprint, inspect
from qtool.decode import Source
from qtool.errors import CalibrationError, InputError, NumericalError
from qtool.evaluate import measure
from qtool.models import calibration, skeleton
from qtool.models.whole import load_model
from qtool.recipe import Calibration

BUILTIN = "builtin:evaluation"  # the half of the built-in text that never calibrates
Step = Callable[[int, int, str], None]


def evaluate(source: Source, against: Source | None = None, text: str = "builtin", windows: int = 20,
             context: int = 1024, device: str = "auto", step: Step = inspect.no_steps) -> dict[str, Any]:
    """The figures, as docs/json.md describes them. Raises InputError, CalibrationError, ModelError, NumericalError."""
    _check(windows, context)
    place = _device(device)
    sources = [source, *([against] if against is not None else [])]
    built = [skeleton.build(one.directory, one.config, one.specs) for one in sources]
    _refuse_mismatch(sources, built, context)
    tokens = _tokens(source, text, windows, context, built[0].vocabulary)
    # float32 on a CPU, so that figures compare between machines; a GPU keeps the model's type to fit it
    dtype = torch.float32 if place.type == "cpu" else sources[-1].dtype
    models = []
    for one, bones in zip(sources, built, strict=True):
        step(0, windows, f"loading {one.name}")
        models.append(load_model(bones, one.read, place, dtype, one.schemes, one.read_quantized, one.cache_scales()))
    figures = _run(models, tokens.ids, place, step)
    return {
        "schema": inspect.SCHEMA,
        "text": {"source": text, "windows": windows, "context": context, "predictions": windows * (context - 1),
                 "sha256": tokens.sha256, "begins_with_bos": tokens.description.get("begins_with_bos", False)},
        "device": str(place), "compute_dtype": str(dtype).removeprefix("torch."),
        "model": _described(source, figures.nll[0]),
        "against": _described(against, figures.nll[1]) if against is not None else None,
        **(measure.divergence(figures) if against is not None else {}),
    }


@torch.inference_mode()
def _run(models: list[torch.nn.Module], ids: torch.Tensor, device: torch.device, step: Step) -> measure.Figures:
    """Window by window, all models side by side."""
    figures = measure.Figures.empty(len(models))
    for index, window in enumerate(ids):
        step(index, len(ids), f"window {index + 1}")
        logits = [model(window[None].to(device), use_cache=False).logits[0, :-1] for model in models]
        measure.add(figures, logits, window[1:].to(device))
        if not all(torch.isfinite(torch.tensor(nll[-1])) for nll in figures.nll):
            raise NumericalError(f"window {index + 1}: the model's predictions are not finite; `qtool inspect "
                                 "--verify` tells whether its weights are")
    return figures


def _tokens(source: Source, text: str, windows: int, context: int, vocabulary: int) -> calibration.CalibrationTokens:
    spec = Calibration.model_validate({"source": BUILTIN if text == "builtin" else text, "sequence_length": context})
    try:
        return calibration.load_tokens(spec, source.directory, windows, vocabulary)
    except CalibrationError as error:  # the same trouble, in the words of this command
        message = str(error)
        for theirs, ours in (("calibration.samples", "--windows"), ("calibration.sequence_length", "--context"),
                             (f"{windows} samples of", f"{windows} windows of"), (" --windows <= 0,", ""),
                             ("calibration", "evaluation")):
            message = message.replace(theirs, ours)
        raise CalibrationError(message) from None


def _described(source: Source, nll: list[float]) -> dict[str, Any]:
    return {"path": source.origin, "name": source.name, **measure.perplexity(nll),
            "weight_bytes": footprint.stored_bytes(source), "bits_per_weight": inspect.bits_per_weight(source)}


def _check(windows: int, context: int) -> None:
    if windows < 1:
        raise InputError(f"--windows {windows}: at least 1 is needed")
    if context < 8:
        raise InputError(f"--context {context}: at least 8 tokens are needed")


def _refuse_mismatch(sources: list[Source], built: list[skeleton.Skeleton], context: int) -> None:
    sizes = [bones.vocabulary for bones in built]
    if len(set(sizes)) > 1:
        raise InputError(f"{sources[0].origin} has a vocabulary of {sizes[0]} tokens, but {sources[1].origin} one of "
                         f"{sizes[1]}; --against is for the model that it was made from")
    positions = sources[0].config.get("max_position_embeddings")
    if isinstance(positions, int) and context > positions:
        raise InputError(f"--context {context} is more than the {positions} positions of this model; use --context "
                         f"{positions} or less")


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
        raise InputError(f"device '{name}' is not known; use auto, cpu, cuda or cuda:1")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise InputError(f"device {name} is not there ({torch.cuda.device_count()} CUDA devices are visible); "
                         "use --device cpu")
    return torch.device(name)
