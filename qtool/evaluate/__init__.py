"""How good checkpoints are on text: perplexity, and how far their predictions are from those of a base.

Text is cut in order into windows that do not overlap; every window is run by itself. A window of T tokens gives T - 1
predictions (of its tokens 2 .. T), and every figure is over exactly these: perplexity = exp(mean negative log
likelihood); KL divergence of the base's next-token distribution from the quantized model's; how often both
find the same token most likely. Logits and everything after them are float32.

One model after the other is in memory, or one block of it (predictions.py); of the base only what follows its blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from qtool import devices, heap, inspect
from qtool.decode import Source
from qtool.errors import CalibrationError, InputError, NumericalError
from qtool.evaluate import cache, describe, measure, predictions
from qtool.models import calibration, skeleton, tokenizer
from qtool.models.calibration import CalibrationTokens
from qtool.recipe import Calibration

SCHEMA = 2  # 1: one model, its figures against the base beside it
BUILTIN = "builtin:evaluation"  # the half of the built-in text that never calibrates
Step = Callable[[int, int, str], None]


def evaluate(models: Sequence[Source], against: Source | None = None, text: str = "builtin", windows: int = 20,
             context: int = 1024, device: str = "auto", step: Step = inspect.no_steps, stream: bool | None = None,
             kept_in: Path | None = None) -> dict[str, Any]:
    """The figures of each model, as docs/json.md describes them.

    stream: one block in memory at a time, or the whole model; None: as there is memory.  kept_in: a folder in which the
    base's part is kept for the next time. Raises InputError, CalibrationError, ModelError, NumericalError.
    """
    place = devices.refuse_missing(devices.named(device))
    sources = [*([against] if against is not None else []), *models]
    refuse(sources, windows, context)
    built = [skeleton.build(one.directory, one.config, one.specs) for one in sources]
    _refuse_vocabularies(sources, built)
    tokens = _tokens(sources, text, windows, context, built[0].vocabulary)
    # float32 on a CPU, so that figures compare between machines; a GPU keeps the model's type to fit it
    dtype = torch.float32 if place.type == "cpu" else sources[0].dtype
    setting = predictions.Setting(tokens.ids, place, dtype, stream, step)
    store = cache.Cache(kept_in)
    base = None
    if against is not None:
        key = "" if kept_in is None else cache.key(against, tokens.sha256, setting)
        base = predictions.reference(against, built[0], setting, lambda run: store.exits(
            key, lambda: predictions.new_store(built[0], setting), run))
    return {
        "schema": SCHEMA,
        "text": {"source": text if text == "builtin" else tokens.description["source"], "windows": windows,
                 "context": context, "predictions": windows * (context - 1),
                 "sha256": tokens.sha256, "begins_with_bos": tokens.description.get("begins_with_bos", False)},
        "device": str(place), "compute_dtype": str(dtype).removeprefix("torch."),
        **_rows(models, against, built[-len(models):], base, setting, store.used),
        "notes": [f"the base's part is not kept: {store.trouble}"] if store.trouble else [],
    }


def _rows(models: Sequence[Source], against: Source | None, built: Sequence[skeleton.Skeleton],
          base: predictions.Logits | None, setting: predictions.Setting, from_cache: bool) -> dict[str, Any]:
    """The figures of the base and of each model, one after the other."""
    parameters = describe.parameters_of(against or models[0])
    rows, figures = [], measure.Figures()
    for source, bones in zip(models, built, strict=True):
        streamed = predictions.streams(source, setting)
        figures = _run(predictions.logits(source, bones, setting, streamed), base, setting, source.name)
        rows.append({**describe.storage(source, parameters), **measure.perplexity(figures.nll),
                     **(measure.divergence(figures) if base else {}), "streamed": streamed})
        heap.give_back()
    reference = None if against is None else {
        **describe.storage(against, parameters), **measure.perplexity(figures.base_nll), "from_cache": from_cache}
    every = [*([reference] if reference else []), *rows]
    describe.tell_apart(every)
    for source, row in zip([*([against] if against else []), *models], every, strict=True):
        row["use_for"] = describe.use_for(source, row, rows)
    return {"against": reference, "models": rows}


def _run(model: predictions.Logits, base: predictions.Logits | None, setting: predictions.Setting,
         name: str) -> measure.Figures:
    """Window by window, the base side by side."""
    figures = measure.Figures()
    for index, window in enumerate(setting.ids):
        setting.step(index, len(setting.ids), f"{name}: window {index + 1}")
        with torch.inference_mode():
            measure.add(figures, window[1:].to(setting.device), model(index), base(index) if base else None)
        for who, nll in ((name, figures.nll), ("the base", figures.base_nll)):
            if nll and not torch.isfinite(torch.tensor(nll[-1])):
                raise NumericalError(f"window {index + 1}: the predictions of {who} are not finite; `qtool inspect "
                                     "--verify` tells whether its weights are")
    return figures


def _tokens(sources: Sequence[Source], text: str, windows: int, context: int, vocabulary: int) -> CalibrationTokens:
    """The windows by the first tokenizer that there is; the others must cut the text alike."""
    spec = Calibration.model_validate({"source": BUILTIN if text == "builtin" else text, "sequence_length": context})
    folders = list(dict.fromkeys(one.directory for one in sources if tokenizer.present(one.directory)))
    try:
        found = [calibration.load_tokens(spec, folder, windows, vocabulary)
                 for folder in folders or [sources[0].directory]]
    except CalibrationError as error:  # the same trouble, in the words of this command
        message = str(error)
        for theirs, ours in (("calibration.samples", "--windows"), ("calibration.sequence_length", "--context"),
                             (f"{windows} samples of", f"{windows} windows of"), (" --windows <= 0,", ""),
                             ("calibration", "evaluation")):
            message = message.replace(theirs, ours)
        raise CalibrationError(message) from None
    for folder, tokens in zip(folders, found, strict=False):
        if tokens.sha256 != found[0].sha256:
            raise InputError(f"the tokenizers of {folders[0]} and {folder} cut this text into different tokens; "
                             "figures per token only compare between models made from one")
    return found[0]


def refuse(sources: Sequence[Source], windows: int, context: int) -> None:
    """Raise InputError for what cannot be evaluated, before anything is read."""
    if windows < 1:
        raise InputError(f"--windows {windows}: at least 1 is needed")
    if context < 8:
        raise InputError(f"--context {context}: at least 8 tokens are needed")
    for source in sources:
        positions = source.config.get("max_position_embeddings")
        if isinstance(positions, int) and context > positions:
            raise InputError(f"--context {context} is more than the {positions} positions of {source.origin}; use "
                             f"--context {positions} or less")


def _refuse_vocabularies(sources: Sequence[Source], built: Sequence[skeleton.Skeleton]) -> None:
    for source, bones in zip(sources, built, strict=True):
        if bones.vocabulary != built[0].vocabulary:
            raise InputError(f"{source.origin} has a vocabulary of {bones.vocabulary} tokens, but "
                             f"{sources[0].origin} one of {built[0].vocabulary}; --against is for the model that the "
                             "others were made from, and only models made from one stand side by side")
