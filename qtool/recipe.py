"""A recipe: YAML and flags become typed, checked data. Knows nothing about any model.

The resolved recipe decides the output together with the source and the calibration tokens; it is kept in the manifest.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from qtool import safe_yaml
from qtool.errors import RecipeError, printable
from qtool.files import read_limited
from qtool.mixtures import MIXTURES

HERE = Path(__file__).parent
FOLDERS = (HERE / "recipes", HERE.parent / "recipes")  # an installed package; a source checkout
MAX_RECIPE_BYTES = 1 << 17  # a parser in Python takes seconds for more
MAX_DIGITS = 20
MAX_COMPLAINTS = 8  # in one message
SIZE = re.compile(r"(?P<number>\d+(\.\d+)?) ?(?P<unit>[kKMGT])(?P<binary>i?)B")
OUTLIER_THRESHOLD = 6.0  # LLM.int8()'s, and what bitsandbytes takes where nothing is said


Strategy = Literal["tensor", "block"]
Activations = Literal["token", "group", "tensor", "outliers"]
RUN_TIME = {"token": "-dynamic", "group": "-dynamic", "tensor": "-static"}  # in labels


def _positive(value: int | str | None) -> int | str | None:
    if isinstance(value, int) and value != -1 and (value < 8 or value % 8):
        raise ValueError("group_size is -1 (per output channel), auto, or a positive multiple of 8")
    return value


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Scheme(Strict):
    """What is stored for one linear: the grid and its parameters. group_size -1 is one group per output row.

    strategy: rows that share scales too (fp8): one for the whole "tensor", or for a "block" of 128 x 128.
    double_quant: scales in 8 bits too (nf4, fp4).  activations: how the linear's inputs are rounded at run time: with a
    scale for each "token", for each "group" of 128 columns of a token, one calibrated scale for the "tensor", or with
    "outliers" left as they are (LLM.int8()).  outlier_threshold: input columns with a value of this size or more are
    outliers; 0: there are none.
    """

    grid: str = "affine"
    bits: int = Field(4, ge=2, le=8)
    group_size: int | Literal["auto"] = 128
    symmetric: bool = True
    strategy: Strategy | None = None
    double_quant: bool = False
    activations: Activations | None = None
    outlier_threshold: float = Field(OUTLIER_THRESHOLD, ge=0.0)

    _positive = field_validator("group_size")(_positive)

    @model_validator(mode="after")
    def _of_outliers(self) -> Scheme:
        if self.activations != "outliers" and self.outlier_threshold != OUTLIER_THRESHOLD:
            raise ValueError("outlier_threshold is for activations: outliers (LLM.int8()); leave it out")
        return self

    @property
    def label(self) -> str:
        """Short name such as int4-g64, uint4-g128 (uint: with zero points), nf4-g64 or fp8-channel."""
        return scheme_label(self.model_dump())


def scheme_label(scheme: Mapping[str, Any]) -> str:
    """The label of a scheme as a manifest has it; keys that older manifests lack have their defaults."""
    group = {-1: "channel", "auto": "gauto"}.get(scheme["group_size"], f"g{scheme['group_size']}")
    group = scheme.get("strategy") or group
    grid = scheme.get("grid", "affine")
    kind = f"{'int' if scheme['symmetric'] else 'uint'}{scheme['bits']}" if grid == "affine" else grid
    nested = "-dq" if scheme.get("double_quant") else ""
    return f"{kind}-{group}{nested}{RUN_TIME.get(scheme.get('activations') or '', '')}"


class Overrides(Strict):
    """What differs from the recipe's scheme."""

    bits: int | None = Field(None, ge=2, le=8)
    group_size: int | Literal["auto"] | None = None
    symmetric: bool | None = None
    grid: str | None = None
    strategy: Strategy | None = None
    double_quant: bool | None = None
    activations: Activations | None = None

    _positive = field_validator("group_size")(_positive)

    def apply(self, scheme: Scheme) -> Scheme:
        changes = {key: value for key in Overrides.model_fields if (value := getattr(self, key)) is not None}
        if self.activations not in (None, "outliers"):  # no outliers here, so no threshold
            changes["outlier_threshold"] = OUTLIER_THRESHOLD
        return Scheme.model_validate({**scheme.model_dump(), **changes})


class Rule(Overrides):
    """Overrides for the linears whose name matches; the first rule that matches wins."""

    match: str
    skip: bool = False

    def matches(self, name: str) -> bool:
        return fnmatch.fnmatchcase(name, self.match)


class Budget(Strict):
    """What the output may take; each linear that no rule matches gets one of `schemes`, where it helps most.

    bits: average stored bits per quantized weight, scales and zero points included.  size: bytes of all tensors of the
    output, or a text such as 4.2GB.  schemes: what may be chosen, as overrides of the recipe's scheme; none: integers
    around the budget in groups of 32, 64 and 128.  samples: calibration sequences that the sensitivities come from.
    """

    bits: float | None = Field(None, gt=0, le=16)
    size: int | None = Field(None, gt=0)
    schemes: tuple[Overrides, ...] = ()
    samples: int = Field(16, ge=1)

    @field_validator("size", mode="before")
    @classmethod
    def _in_bytes(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        found = SIZE.fullmatch(value.strip())
        if found is None:
            raise ValueError("a size is a number with kB, MB, GB or TB (or KiB, MiB, GiB, TiB), such as 4.2GB")
        power = "KMGT".index(found["unit"].upper()) + 1
        if len(found["number"]) > MAX_DIGITS:
            raise ValueError(f"a size has at most {MAX_DIGITS} digits, such as 4.2GB")
        return int(float(found["number"]) * (1024 if found["binary"] else 1000) ** power)

    @model_validator(mode="after")
    def _one_of_two(self) -> Budget:
        if (self.bits is None) == (self.size is None):
            raise ValueError("a budget has bits (an average, such as 3.5) or size (such as 4.2GB), one of the two")
        return self


class Calibration(Strict):
    """Which text is run through the model.

    samples None: 128 on a CPU, 512 on a GPU.  batch_tokens None: 1,024 on a CPU (a batch then fits its caches),
    16,384 on a GPU.
    """

    source: str = "builtin"
    samples: int | None = Field(None, ge=1)
    sequence_length: int = Field(512, ge=8)
    held_out: float = Field(0.0625, ge=0.0, le=0.5)
    batch_tokens: int | None = Field(None, ge=1)


def _steps(value: Any) -> Any:
    if not isinstance(value, (list, tuple)) or not value:
        raise ValueError("steps is a list of method names, each with its options: - gptq: {damping: 0.01}")
    steps = []
    for entry in value:
        entry = {entry: {}} if isinstance(entry, str) else entry
        if not isinstance(entry, Mapping) or len(entry) != 1:
            raise ValueError(f"each step is one name with its options, not {entry!r}")
        steps.append({name: options or {} for name, options in entry.items()})
    return tuple(steps)


class Output(Strict):
    """One of several outputs of a run. What is not given here is the recipe's; `name` is its folder's."""

    name: str = Field(pattern=r"^\w[\w.-]*$")
    steps: tuple[dict[str, dict[str, Any]], ...] | None = None
    scheme: Scheme | None = None
    rules: tuple[Rule, ...] | None = None
    format: str | None = None

    @field_validator("steps", mode="before")
    @classmethod
    def _one_step_per_entry(cls, value: Any) -> Any:
        return None if value is None else _steps(value)


class Recipe(Strict):
    """A whole run. `steps` is a list of {name: options}; the options belong to methods/<name>.py."""

    name: str = "custom"
    preset: str | None = None
    steps: tuple[dict[str, dict[str, Any]], ...] = ({"rtn": {}},)
    scheme: Scheme = Scheme()
    mixture: str | None = None  # of GGUF types, such as q4_k_m; then the scheme is that of each tensor's type
    budget: Budget | None = None
    rules: tuple[Rule, ...] = ()
    format: str = "compressed-tensors"
    calibration: Calibration = Calibration()
    kv_cache: Literal["fp8"] | None = None  # calibrated scales for engines that keep keys and values in FP8
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    seed: int = Field(0, ge=0, lt=1 << 63)
    memory_budget_gb: float = Field(4.0, gt=0)  # activations past this go to a memory-mapped file
    shard_gb: float = Field(4.0, gt=0)
    keep_statistics: bool = False  # those that the linears are solved on, beside them, for a --redo without text
    outputs: tuple[Output, ...] = ()  # several from one calibration; the stream runs through the first's weights ...
    propagate: Literal["original"] | None = None  # ... or through the model's own

    @model_validator(mode="after")
    def _distinct_outputs(self) -> Recipe:
        names = [one.name for one in self.outputs]
        if len(set(names)) < len(names):
            raise ValueError(f"two of the outputs have one name: {', '.join(names)}")
        if self.outputs and (self.budget or self.kv_cache):
            raise ValueError("a budget and kv_cache are for runs with one output; leave them or outputs out")
        if self.outputs and self.keep_statistics:
            raise ValueError("statistics are kept for --redo, which changes runs with one output; leave outputs or "
                             "keep_statistics out")
        if self.propagate and not self.outputs:
            raise ValueError("propagate is for a recipe with outputs; leave it out")
        return self

    def each(self) -> dict[str, Recipe]:
        """The recipes of the outputs, by name."""
        made = {}
        for one in self.outputs:
            own = {key: value for key in Output.model_fields if (value := getattr(one, key)) is not None}
            alone = {"outputs": (), "propagate": None, "name": f"{self.name}-{one.name}"}
            made[one.name] = self.model_copy(update={**own, **alone})
        return made

    @field_validator("steps", mode="before")
    @classmethod
    def _one_step_per_entry(cls, value: Any) -> Any:
        return _steps(value)

    @field_validator("budget", mode="before")
    @classmethod
    def _bits_or_size(cls, value: Any) -> Any:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return {"bits": value}
        if isinstance(value, str):
            return {"bits" if re.fullmatch(r"[\d.]+|nan|inf", value) else "size": value}
        return value

    @field_validator("mixture")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        if value is not None and value not in MIXTURES:
            raise ValueError(f"no such mixture of GGUF types{_nearest(value, MIXTURES)}; known: {', '.join(MIXTURES)}")
        return value

    @property
    def method(self) -> str:
        return "+".join(next(iter(step)) for step in self.steps)

    @property
    def measures_ranges(self) -> bool:
        """Whether text is needed for scales of activations, whatever the steps are."""
        static = "tensor" in (self.scheme.activations, *(rule.activations for rule in self.rules))
        return static or self.kv_cache is not None

    @property
    def search_samples(self) -> int:
        """Calibration sequences that a budget's schemes will be chosen on; 0: there is nothing to choose."""
        return min(self.calibration.samples or 0, self.budget.samples) if self.budget else 0

    def scheme_for(self, name: str, base: Scheme | None = None) -> tuple[Scheme | None, int | None]:
        """The scheme of the linear called name (None: left as it is), and the index of the rule that said so.

        base: where it is not the recipe's own scheme.
        """
        for index, rule in enumerate(self.rules):
            if rule.matches(name):
                return None if rule.skip else rule.apply(base or self.scheme), index
        return base or self.scheme, None


def available() -> dict[str, Path]:
    """The ready recipes by file name."""
    return {path.stem: path for folder in FOLDERS for path in sorted(folder.glob("*.yaml"))}


def load(name: str) -> Recipe:
    """Read a recipe from a YAML file, or a ready recipe by name. Raises RecipeError."""
    ready = available()
    path = Path(name) if name.endswith((".yaml", ".yml")) or Path(name).is_file() else ready.get(name)
    if path is None:
        raise RecipeError(f"there is no recipe called '{name}'{_nearest(name, ready)}; ready ones: {', '.join(ready)}")
    return parse(_read(path), str(path))


def preset(method: str) -> Recipe:
    """The ready recipe that `--method METHOD` stands for: the one whose `preset` key says so."""
    if method in MIXTURES:
        return override(load("gguf"), {"mixture": method, "preset": method}, f"--method {method}")
    found = {}
    for path in available().values():
        data = safe_yaml.parse(_read(path), str(path))
        if isinstance(data, dict) and isinstance(data.get("preset"), str):
            found[data["preset"]] = path
    if method not in found:
        known = [*sorted(found), *MIXTURES]
        raise RecipeError(f"unknown method '{method}'{_nearest(method, known)}; methods: {', '.join(known)}")
    return parse(_read(found[method]), str(found[method]))


def document(path: Path, what: str) -> Any:
    """The plain data of a YAML file, as strictly read as a recipe. Raises RecipeError, which calls it `what`."""
    return safe_yaml.parse(_read(path, what), str(path))


def parse(text: str, where: str) -> Recipe:
    """Check the YAML text of a recipe; every complaint names the file, the key and, for a typo, the nearest name."""
    data = safe_yaml.parse(text, where)
    if not isinstance(data, dict):
        raise RecipeError(f"{where}: a recipe is a mapping of keys such as steps, scheme, format")
    return _validate(data, where, text)


def override(recipe: Recipe, changes: Mapping[str, Any], where: str = "--set") -> Recipe:
    """The recipe with dotted keys replaced, e.g. {'scheme.bits': 3, 'steps.gptq.damping': 0.05}."""
    data = recipe.model_dump(mode="json")
    for key, value in changes.items():
        _assign(data, key.split("."), value, key, where)
    return _validate(data, where)


def parse_setting(setting: str) -> tuple[str, Any]:
    """'key=value' of --set; the value is YAML, so numbers, booleans and null have their types."""
    key, equals, value = setting.partition("=")
    if not equals or not key.strip():
        raise RecipeError(f"--set {setting}: write it as key=value, e.g. --set scheme.bits=3")
    return key.strip(), safe_yaml.parse(value, f"--set {key}")


def _assign(data: dict[str, Any], keys: list[str], value: Any, whole: str, where: str) -> None:
    if keys[0] == "steps" and len(keys) == 3:
        for step in data["steps"]:
            if keys[1] in step:
                step[keys[1]][keys[2]] = value
                return
        names = [name for step in data["steps"] for name in step]
        raise RecipeError(f"{where} {whole}: the recipe has no step '{keys[1]}'; its steps: {', '.join(names)}")
    for key in keys[:-1]:
        if key == "budget" and data.get(key) is None:
            data[key] = {}
        if not isinstance(data.get(key), dict):
            raise RecipeError(f"{where} {whole}: '{key}' has no keys below it{_nearest(key, data)}")
        data = data[key]
    data[keys[-1]] = value


def _read(path: Path, what: str = "recipe file") -> str:
    try:
        return read_limited(path, MAX_RECIPE_BYTES).decode("utf-8")
    except FileNotFoundError:
        ready = f"; ready recipes: {', '.join(available())}" if what == "recipe file" else ""
        raise RecipeError(f"{what} {path} does not exist{ready}") from None
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else f"it is no UTF-8 text ({error})"
        raise RecipeError(f"{what} {path} cannot be read: {why}; give a YAML file") from None


def _validate(data: dict[str, Any], where: str, text: str = "") -> Recipe:
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        found = error.errors()
        more = f"; and {len(found) - MAX_COMPLAINTS} more" if len(found) > MAX_COMPLAINTS else ""
        complaints = [_complaint(entry, text) for entry in found[:MAX_COMPLAINTS]]
        raise RecipeError(f"{where}: {'; '.join(complaints)}{more}") from None


def _complaint(entry: Any, text: str) -> str:
    path = [str(part) for part in entry["loc"] if part not in ("int", "literal['auto']")]
    key = ".".join(path)
    line = f" (line {safe_yaml.line_of(text, entry['loc'])})" if text else ""
    if entry["type"] == "extra_forbidden":
        parts: dict[str, type[BaseModel]] = {"scheme": Scheme, "rules": Rule, "calibration": Calibration,
                                             "budget": Budget, "outputs": Output}
        model = parts.get(path[0] if len(path) > 1 else "", Recipe)
        return f"unknown key '{printable(key)}'{line}{_nearest(path[-1], model.model_fields)}"
    return f"{printable(key)}{line}: {entry['msg'].removeprefix('Value error, ')} (given: {shown(entry['input'])})"


def shown(value: Any) -> str:
    """A value as a message has it: one line, not endless."""
    return printable(repr(value), 120)


def _nearest(name: str, names: Any) -> str:
    close = difflib.get_close_matches(name, list(names), 1, 0.5)
    return f"; did you mean '{close[0]}'?" if close else ""
