"""Tiny checkpoints in many formats, and the same models with their weights dequantized."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from qtool import decode
from qtool.models import skeleton
from qtool.models.whole import load_model
from tests import tiny
from tests.cli.conftest import make

CPU = torch.device("cpu")
Make = Callable[..., Path]


@pytest.fixture(scope="session")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """quantized(family, *arguments of quantize): made once; without arguments the model itself."""
    folder, made = tmp_path_factory.mktemp("running"), dict[tuple[str, ...], Path]()

    def get(family: str, *arguments: str, **overrides: Any) -> Path:
        key = (family, *arguments, repr(sorted(overrides.items())))
        if key not in made:
            source = folder / f"{len(made)}-{family}"
            tiny.make(source, family, num_hidden_layers=2, **overrides)
            made[key] = source
            if arguments:
                made[key] = folder / f"{len(made)}-out"
                make("quantize", source, *arguments, "--out", made[key], "--quiet")
        return made[key]

    return get


def decoded(path: Path) -> torch.nn.Module:
    """The model as `eval` has it, but with the exact values of the quantized weights, not rounded to bfloat16."""
    return decoded_source(decode.open_model(str(path)))


def decoded_source(source: decode.Source) -> torch.nn.Module:
    bones = skeleton.build(source.directory, source.config, source.specs)

    def read(name: str) -> torch.Tensor:
        linear = name.removesuffix(".weight")
        return source.decoded(linear) if linear in source.schemes else source.read(name)

    return load_model(bones, read, CPU, torch.float32, source.schemes, source.read_quantized)


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(tiny.VOCABULARY, shape, generator=torch.Generator().manual_seed(5))


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)
