"""The types of what a manifest says, as far as something reads it. What more it says is nobody's business here."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from qtool.errors import printable
from qtool.recipe import Scheme


def _inside(name: str) -> str:
    """A path that stays in its directory."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in name:
        raise ValueError("is no path within the output")
    return name


Size = Annotated[int, Field(ge=0, lt=1 << 63)]
Figure = Annotated[float, Field(allow_inf_nan=False)]
File = Annotated[str, AfterValidator(_inside)]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True)


class _Source(_Part):
    name: str | None = None
    origin: str | None = None
    files: dict[str, str]


class _Recipe(_Part):
    steps: list[Annotated[dict[str, dict[str, Any]], Field(min_length=1, max_length=1)]]


class _Calibration(_Part):
    source: str
    samples: Size
    sequence_length: Size
    sha256: str = ""


class _Outlier(_Part):
    column: Size
    largest: Figure
    share: Figure


class _Tuned(_Part):
    loss_before: Figure
    loss_after: Figure
    steps: Size
    kept_step: Size


class _Layer(_Part):
    name: str
    stored: str
    block: int | None = None
    shape: Annotated[list[Size], Field(min_length=2, max_length=2)]
    scheme: Annotated[Scheme, Field(strict=False)]
    bytes: Size
    relative_error: Figure | None
    weight_error: Figure | None
    sqnr_db: Figure | None = None
    tokens: Size = 0
    damping: Figure | None = None
    repaired: dict[str, str] | bool = False  # bool: in older ones
    pooled: bool = False
    rescaled: bool = False
    outlier_features: Size | None = None
    outliers: list[_Outlier] | None = None
    tuned: list[_Tuned] | None = Field(None, min_length=1)


class _Kept(_Part):
    name: str
    reason: str


class _Totals(_Part):
    parameters: Size
    weight_bytes: Size
    source_bytes: Size
    quantized_weights: Size
    bits_per_weight: Figure | None


class _Choice(_Part):
    name: str
    scheme: str
    losses: dict[str, Figure]

    @model_validator(mode="after")
    def _one_of_them(self) -> _Choice:
        if self.scheme not in self.losses:
            raise ValueError("the scheme is none of those whose losses are known")
        return self


class _Allocation(_Part):
    limit_bytes: Size
    bytes: Size
    bits_per_weight: Figure
    samples: Size
    loss: Figure | None
    linears: list[_Choice]


class _Point(_Part):
    step: Size
    fitting: Figure | None
    held_out: Figure


class _Learned(_Part):
    loss: str
    steps: Size
    kept_step: Size
    tokens: Size
    curve: list[_Point]


class _Rotation(_Part):
    tensors: list[str]
    untied: list[str]


class _Redone(_Part):
    patterns: list[str]
    linears: dict[str, Annotated[Scheme, Field(strict=False)]]
    recipe: _Recipe
    calibration: _Calibration | None


class _Manifest(_Part):
    schema_: Literal[1] = Field(alias="schema")
    qtool: str
    source: _Source
    recipe: _Recipe | None
    calibration: _Calibration | None
    versions: dict[str, str]
    format: str = ""
    layers: list[_Layer]
    rotation: _Rotation | None = None
    kept: list[_Kept]
    outputs: dict[File, str]
    several: list[File] = Field([], min_length=1)
    allocation: _Allocation | None = None
    learned: _Learned | None = None
    totals: _Totals
    redone: list[_Redone] = []


def complaint(data: dict[str, Any]) -> str | None:
    """The first thing in a manifest that is not of its type; None where all is well."""
    try:
        _Manifest.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        return f"{printable(key)}: {printable(first['msg'].removeprefix('Value error, '))}"
    return None
