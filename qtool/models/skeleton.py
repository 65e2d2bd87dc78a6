"""The shape of a model without its weights: blocks, linears, and which checkpoint tensor fills which parameter."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qtool import heap
from qtool.errors import CalibrationError, ModelError
from qtool.models import experts, families, tokenizer
from qtool.tensors import TensorSpec

OTHER_INPUTS = ("vision_config", "audio_config", "speech_config", "video_config")
# What transformers raises on a config that its code cannot use.
BAD_CONFIG = (ValueError, KeyError, TypeError, AttributeError, IndexError, ArithmeticError, RuntimeError, ImportError,
              AssertionError, OSError)
MAX_NAMED = 4  # tensor names in one message


@dataclass(frozen=True)
class Skeleton:
    """A decoder on the meta device, in eval mode, experts split; names are module paths of `model`.

    blocks: paths of the decoder blocks in order.  parameters: shape of every tensor that the checkpoint must hold, by
    parameter name (tied aliases left out).  tied: alias -> the parameter it shares.  head: the untied output linear.
    routers: nn.Linear modules that choose experts; no block linears.  expert_layers: paths of the SplitExperts.
    ignored: tensors of the checkpoint that the model does not read.  dtype: the model's own element type.
    """

    model: nn.Module
    blocks: tuple[str, ...]
    parameters: dict[str, tuple[int, ...]]
    tied: dict[str, str]
    head: str | None
    embeddings: tuple[str, ...]
    routers: tuple[str, ...]
    expert_layers: tuple[str, ...]
    ignored: tuple[str, ...]
    hidden: int
    vocabulary: int
    dtype: torch.dtype
    model_type: str

    def block_linears(self, index: int) -> dict[str, tuple[int, int]]:
        """Full name -> (N, K) of the linears of block `index` in module order; routers are left out."""
        prefix = self.blocks[index]
        return {f"{prefix}.{path}": (module.out_features, module.in_features)
                for path, module in self.model.get_submodule(prefix).named_modules()
                if isinstance(module, nn.Linear) and f"{prefix}.{path}" not in self.routers}

    def attention(self, index: int) -> tuple[str, str] | None:
        """The module of block `index` that makes keys and values, and its name in the checkpoint; None: not known."""
        keys = [name for name in self.block_linears(index) if name.rpartition(".")[2] in ("k_proj", "qkv_proj")]
        if len(keys) != 1:
            return None
        return keys[0].rpartition(".")[0], self.stored(keys[0]).rpartition(".")[0]

    def source(self, parameter: str) -> str:
        """The checkpoint tensor that holds a parameter; of a tied alias, the one that holds what it shares."""
        return families.checkpoint_name(self.model_type, self.tied.get(parameter, parameter))

    def stored(self, linear: str) -> str:
        """What the checkpoint calls a linear."""
        return self.source(f"{linear}.weight").removesuffix(".weight")

    def both_names(self, linears: Iterable[str]) -> list[str]:
        """What a config calls linears: some readers look for a module, some for what the checkpoint calls it. Of the
        output head all know the module."""
        return list(dict.fromkeys(name for one in linears
                                  for name in ((one,) if one == self.head else (one, self.stored(one)))))

    def block_parameters(self, index: int) -> list[str]:
        """Parameters (and stored buffers) of block `index`."""
        return [name for name in self.parameters if name.startswith(self.blocks[index] + ".")]


def build(directory: Path, config: Mapping[str, Any], specs: Mapping[str, TensorSpec]) -> Skeleton:
    """Build the model that `directory`/config.json describes and check it against the checkpoint's tensors.

    No weight is read and no code of the checkpoint is run. Raises ModelError.
    """
    model_config = _config(directory, config, specs)
    model = _meta_model(directory, model_config)
    model_type = model_config.model_type
    expert_layers = experts.split(model, families.expert_linears(model_type))
    blocks = _blocks(directory, model)
    tied = dict(model.get_expanded_tied_weights_keys(all_submodels=True))
    parameters = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}
    embedding = _path(model, model.get_input_embeddings())
    output = _path(model, model.get_output_embeddings())
    skeleton = Skeleton(
        model=model, blocks=blocks, parameters=parameters, tied=tied,
        head=output if output and f"{output}.weight" not in tied else None,
        embeddings=tuple(name for name in parameters if embedding and name.startswith(embedding + ".")),
        routers=_routers(model, expert_layers), expert_layers=tuple(expert_layers),
        ignored=_extras(model, parameters, tied, model_type, specs),
        hidden=model_config.get_text_config().hidden_size, vocabulary=parameters[f"{embedding}.weight"][0],
        dtype=model_config.dtype or torch.float32, model_type=model_type)
    _check_tensors(directory, skeleton, specs)
    _check_vocabulary(directory, skeleton)
    return skeleton


def config_values(directory: Path, config: Mapping[str, Any], specs: Mapping[str, TensorSpec]) -> dict[str, Any]:
    """config.json of a text model with the defaults of its class filled in. Raises ModelError."""
    values: dict[str, Any] = _config(directory, config, specs).get_text_config().to_dict()
    return values


def _config(directory: Path, raw: Mapping[str, Any], specs: Mapping[str, TensorSpec]) -> Any:
    from transformers import CONFIG_MAPPING, AutoConfig

    model_type = raw.get("model_type")
    if "auto_map" in raw and model_type not in CONFIG_MAPPING:
        raise ModelError(f"{directory}: model type '{model_type}' is defined by code inside the checkpoint (auto_map), "
                         "which qtool never runs; only architectures that transformers itself implements can be used")
    # transformers would build them all: a hostile config could ask for a billion
    for key in ("num_hidden_layers", "n_layer", "num_layers", "num_experts", "num_local_experts", "n_routed_experts"):
        count = raw.get(key)
        if isinstance(count, int) and count > max(len(specs), 1):
            raise ModelError(f"{directory}/config.json: {key} is {count}, but the checkpoint holds only {len(specs)} "
                             "tensors; the config belongs to another model")
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except _bad_config() as error:
        heap.raise_exhausted(error)
        raise ModelError(f"{directory}/config.json: transformers cannot read it: {_short(error)}") from None
    other = [key for key in OTHER_INPUTS if getattr(config, key, None) is not None]
    if getattr(config, "is_encoder_decoder", False) or other:
        kind = f"has {', '.join(other)}" if other else "is an encoder-decoder"
        raise ModelError(f"{directory}: {config.model_type} {kind}; only text decoders (causal language models) are "
                         "supported")
    return config


def _meta_model(directory: Path, config: Any) -> Any:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(f"{directory}: {config.model_type} is no causal language model in transformers")
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # weights arrive dequantized
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except _bad_config() as error:
        heap.raise_exhausted(error)
        raise ModelError(f"{directory}/config.json: transformers cannot build {config.model_type}: {_short(error)}") \
            from None
    return model.eval().requires_grad_(False)


def _bad_config() -> tuple[type[Exception], ...]:
    from huggingface_hub.errors import StrictDataclassError  # transformers has imported it already

    return (*BAD_CONFIG, StrictDataclassError)


def _blocks(directory: Path, model: nn.Module) -> tuple[str, ...]:
    """Paths of the longest ModuleList that lies in no other ModuleList and whose members hold linears."""
    best: tuple[str, ...] = ()
    nested = ""
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or (nested and path.startswith(nested)):
            continue
        nested = path + "."
        with_linears = all(any(isinstance(part, nn.Linear) and part is not block for part in block.modules())
                           for block in module)
        if with_linears and len(module) > len(best):
            best = tuple(f"{path}.{index}" for index in range(len(module)))
    if not best:
        raise ModelError(f"{directory}: {type(model).__name__} has no decoder blocks with linear layers")
    return best


def _path(model: nn.Module, wanted: nn.Module | None) -> str | None:
    return next((path for path, module in model.named_modules() if module is wanted), None)


def _routers(model: nn.Module, expert_layers: list[str]) -> tuple[str, ...]:
    """Linears that sit beside experts choose or weigh them; their output is no activation."""
    parents = {path.rpartition(".")[0] for path in expert_layers}
    return tuple(f"{parent}.{name}" for parent in sorted(parents)
                 for name, module in model.get_submodule(parent).named_children() if isinstance(module, nn.Linear))


def _extras(model: Any, parameters: Mapping[str, Any], tied: Mapping[str, str], model_type: str,
            specs: Mapping[str, TensorSpec]) -> tuple[str, ...]:
    """Tensors of the checkpoint without a place in the model that are known to be harmless."""
    used = {families.checkpoint_name(model_type, name) for name in parameters}
    patterns = [families.HARMLESS_EXTRAS, *(model._keys_to_ignore_on_load_unexpected or ())]
    return tuple(name for name in specs if name not in used
                 and (name in tied or any(re.search(pattern, name) for pattern in patterns)))


def _check_tensors(directory: Path, skeleton: Skeleton, specs: Mapping[str, TensorSpec]) -> None:
    expected = {skeleton.source(name): shape for name, shape in skeleton.parameters.items()}
    missing = [name for name in expected if name not in specs]
    extra = [name for name in specs if name not in expected and name not in skeleton.ignored]
    fused = [name for name in extra if len(specs[name].shape) == 3]
    if fused and any(name.rpartition(".experts.")[0] for name in missing):
        raise ModelError(f"{directory}: this checkpoint keeps the experts of a layer in one tensor ({fused[0]}); only "
                         "checkpoints with one tensor per expert are supported")
    for problem, names in (("lacks", missing), ("holds tensors without a place in the model:", extra)):
        if names:
            raise ModelError(f"{directory}: the checkpoint {problem} {_listed(names)}; the weights "
                             f"do not belong to config.json ({skeleton.model_type}, {len(skeleton.blocks)} blocks)")
    for name, shape in expected.items():
        if specs[name].shape != shape:
            found = list(specs[name].shape)
            raise ModelError(f"{directory}: {name} has shape {found} in the checkpoint, but config.json asks for "
                             f"{list(shape)}")


def _check_vocabulary(directory: Path, skeleton: Skeleton) -> None:
    if not tokenizer.present(directory):
        return
    try:
        count = len(tokenizer.load(directory))
    except CalibrationError:  # only calibration needs it, and says so itself
        return
    if count > skeleton.vocabulary:
        raise ModelError(f"{directory}: the tokenizer has {count} tokens, but the embedding only {skeleton.vocabulary} "
                         "rows; tokenizer files and weights do not belong together")


def _listed(names: list[str]) -> str:
    more = len(names) - MAX_NAMED
    return ", ".join(names[:MAX_NAMED]) + (f" and {more} more" if more > 0 else "")


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
