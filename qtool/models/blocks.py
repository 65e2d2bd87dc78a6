"""One decoder block at a time: its weights, and the arguments that the model around it would pass."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from qtool.errors import ModelError
from qtool.models.skeleton import Skeleton
from qtool.models.streams import StreamStore, refuse_overflow

Read = Callable[[str], torch.Tensor]  # checkpoint tensor name -> tensor


def choose_compute_dtype(device: torch.device, model_dtype: torch.dtype) -> torch.dtype:
    """The element type to compute in: the model's own, except on CPUs that would have to emulate it."""
    if device.type != "cpu" or model_dtype == torch.float32:
        return model_dtype
    native = (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()) and \
        torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if model_dtype == torch.bfloat16 and native else torch.float32


def load_block(skeleton: Skeleton, index: int, read: Read, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Block `index` with its weights in `dtype` on `device`, read one by one; dropping it frees them."""
    prefix = skeleton.blocks[index]
    block = copy.deepcopy(skeleton.model.get_submodule(prefix), _shared(skeleton))
    fill(skeleton, block, prefix + ".", read, device, dtype)
    return block


def _shared(skeleton: Skeleton) -> dict[int, Any]:
    """deepcopy's memo that keeps the config one object (its attention setting is looked up by identity)."""
    config = skeleton.model.config
    return {id(config): config}


def fill(skeleton: Skeleton, module: nn.Module, prefix: str, read: Read, device: torch.device,
          dtype: torch.dtype) -> None:
    """Replace the meta tensors of `module`, at path `prefix` in the model, by real ones.

    Embedding tables stay in their stored type: only the rows that are looked up are ever converted.
    """
    for path, part in module.named_modules():
        where = f"{prefix}{path}." if path else prefix
        table = isinstance(part, nn.Embedding)
        _fill_buffers(skeleton, part, where, read, device)  # first: the initialisation would overwrite real weights
        for name, parameter in list(part.named_parameters(recurse=False)):
            if parameter.is_meta:
                wanted = None if table else torch.float32 if _stays_float32(skeleton, where + name, dtype) else dtype
                tensor = read(skeleton.source(where + name)).to(device=device, dtype=wanted)
                setattr(part, name, nn.Parameter(tensor, requires_grad=False))
        if table:
            part.register_forward_hook(lambda _module, _inputs, output: output.to(dtype))


def _stays_float32(skeleton: Skeleton, parameter: str, dtype: torch.dtype) -> bool:
    """Whether transformers keeps this parameter in float32 although the model is in `dtype` (some routers)."""
    patterns = set(getattr(skeleton.model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        patterns |= set(getattr(skeleton.model, "_keep_in_fp32_modules", None) or ())
    return any(pattern in parameter for pattern in patterns)


def _fill_buffers(skeleton: Skeleton, part: nn.Module, where: str, read: Read, device: torch.device) -> None:
    """Stored buffers come from the checkpoint; the others are computed by transformers' own initialisation."""
    meta = {name: buffer for name, buffer in part.named_buffers(recurse=False) if buffer.is_meta}
    computed = {name: buffer for name, buffer in meta.items() if where + name not in skeleton.parameters}
    for name in meta.keys() - computed.keys():
        part._buffers[name] = read(skeleton.source(where + name)).to(device)
    for name, buffer in computed.items():
        unset = float("nan") if buffer.is_floating_point() else 0
        part._buffers[name] = torch.full(buffer.shape, unset, dtype=buffer.dtype)
    if computed:
        with torch.no_grad():
            _owner(skeleton.model, where)._init_weights(part)
    for name in computed:
        value = part._buffers[name]
        if value is None or (value.is_floating_point() and value.isnan().any()):
            raise ModelError(f"{where}{name}: transformers does not say how to compute this buffer of "
                             f"{type(part).__name__}, and no checkpoint stores it")
        part._buffers[name] = value.to(device)


def _owner(model: nn.Module, where: str) -> Any:
    """The innermost model of transformers' own kind around the module at path `where`: it initialises its parts."""
    names = where.rstrip(".").split(".")
    paths = [".".join(names[:count]) for count in range(len(names), 0, -1)]
    return next((part for part in map(model.get_submodule, paths) if hasattr(part, "_init_weights")), model)


@dataclass
class BlockArguments:
    """What each block receives beside the hidden states. One copy per batch size, tensors shared between blocks.

    as_tuple: whether the model wants each block's output in a tuple.
    """

    as_tuple: bool = False
    _recorded: dict[tuple[int, int], tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=dict)

    def for_block(self, index: int, size: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional (after the hidden states) and keyword arguments of block `index` for `size` sequences."""
        return self._recorded[index, size]

    def record(self, name: str, index: int, size: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the arguments of a block; those of a later batch of the same size must be equal. Raises ModelError."""
        if not _same(self._recorded.setdefault((index, size), (args, kwargs)), (args, kwargs)):
            raise ModelError(f"{name} receives arguments that depend on the text (not only on its length); models of "
                             "this kind cannot be run block by block")


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and (left is right or torch.equal(left, right))
    if isinstance(left, (tuple, list)):
        return len(left) == len(right) and all(map(_same, left, right))
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(_same(value, right[key]) for key, value in left.items())
    if isinstance(left, (str, int, float)):
        return left == right
    return type(left) is type(right)


class _Finished(Exception):  # noqa: N818 - no error: it stops a forward pass that has told all it can
    pass


class _TupleExpected(Exception):  # noqa: N818
    pass


class _Recorder(nn.Module):
    """Stands in a block's place: keeps the arguments, returns the hidden states as they came."""

    def __init__(self, original: nn.Module, index: int, visit: Callable[[int, torch.Tensor, Any, Any], Any]) -> None:
        super().__init__()
        self.__dict__["original"] = original  # not a submodule: its meta weights must stay out of sight
        self.index = index
        self.visit = visit

    def __getattr__(self, name: str) -> Any:
        if "original" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.__dict__["original"], name)  # models ask a block for its attention type and the like

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if args:
            hidden, args = args[0], args[1:]
        else:
            hidden = kwargs.pop("hidden_states")
        return self.visit(self.index, hidden, args, kwargs)


def capture(skeleton: Skeleton, read: Read, ids: torch.Tensor, store: StreamStore, device: torch.device,
            dtype: torch.dtype, batches: Sequence[slice]) -> BlockArguments:
    """Run everything before the first block on ids int64 [S, T]; the hidden states go to `store`.

    The blocks are replaced by recorders, so the arguments of all of them are known afterwards, whatever the
    architecture. Embeddings are read and freed here. Raises ModelError.
    """
    reason = ""
    with torch.no_grad():  # not inference mode: methods may differentiate through a block with these arguments
        for as_tuple in (False, True):
            arguments = BlockArguments(as_tuple)
            try:
                _capture(skeleton, read, ids, store, device, dtype, batches, arguments, as_tuple)
                return arguments
            except _TupleExpected:
                continue
            except (ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
                reason = f"; {type(error).__name__}: {error}"
    raise ModelError(f"{skeleton.model_type}: more than the hidden states passes from block to block, so the blocks "
                     f"cannot be run one by one{reason}")


def _capture(skeleton: Skeleton, read: Read, ids: torch.Tensor, store: StreamStore, device: torch.device,
             dtype: torch.dtype, batches: Sequence[slice], arguments: BlockArguments, as_tuple: bool) -> None:
    state: dict[str, Any] = {}
    last, base_path = len(skeleton.blocks) - 1, skeleton.model.base_model_prefix

    def visit(index: int, hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        batch = state["batch"]
        if index == 0:
            state["hidden"] = hidden
            if hidden.shape != (batch.stop - batch.start, *store.shape[1:]):
                raise ModelError(f"{skeleton.model_type}: the blocks receive hidden states {list(hidden.shape)}, "
                                 "not [samples, tokens, hidden]; models of this kind cannot be run block by block")
            refuse_overflow(f"{base_path}: the input of its first block", hidden, store.dtype, batch)
            store.write(batch, hidden)
        elif hidden is not state["hidden"]:
            raise _TupleExpected
        arguments.record(skeleton.blocks[index], index, batch.stop - batch.start, args, kwargs)
        if index == last:
            raise _Finished
        return (hidden,) if as_tuple else hidden

    if not isinstance(base_path, str) or not skeleton.blocks[0].startswith(base_path + "."):
        raise ModelError(f"{skeleton.model_type}: the blocks lie outside the base model {base_path}")
    runner = without_blocks(skeleton, base_path, visit, read, device, dtype)
    for batch in batches:
        state["batch"] = batch
        try:
            runner(ids[batch].to(device), use_cache=False)
        except _Finished:
            continue
        raise ModelError(f"{skeleton.model_type}: the model does not run its last block {skeleton.blocks[last]}")


def without_blocks(skeleton: Skeleton, path: str, visit: Callable[[int, torch.Tensor, Any, Any], Any], read: Read,
                   device: torch.device, dtype: torch.dtype, embedded: bool = False) -> nn.Module:
    """A copy of the submodule at `path` ("": the whole model) with its weights, except that block i only returns what
    visit(i, hidden states, other arguments, keyword arguments) does. embedded: to be called with inputs_embeds, so the
    whole model needs no embeddings."""
    blocks = skeleton.model.get_submodule(skeleton.blocks[0].rpartition(".")[0])
    recorders = nn.ModuleList(_Recorder(block, index, visit) for index, block in enumerate(blocks.children()))
    runner = copy.deepcopy(skeleton.model.get_submodule(path), {**_shared(skeleton), id(blocks): recorders})
    if embedded:
        runner.set_input_embeddings(nn.Identity())  # type: ignore[operator]
    fill(skeleton, runner, path + "." if path else "", read, device, dtype)
    return runner
