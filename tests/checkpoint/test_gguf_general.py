"""general.* keys of a GGUF file: those of llama.cpp's converter; a card of strange things does no harm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
from gguf import GGUFReader, GGUFWriter
from gguf.metadata import Metadata

from qtool import export_gguf
from qtool.checkpoint import gguf_general
from qtool.decode import open_model
from tests import tiny

CARD = """---
license: apache-2.0
language:
- en
- no
tags: [text, small]
pipeline_tag: text-generation
base_model: someone/Some-Model-7B-Instruct-v0.2
datasets:
- HuggingFaceFW/fineweb
---
# A model
"""


def keys(path: Path) -> dict[str, Any]:
    return {key: field.contents() for key, field in GGUFReader(path).fields.items() if key.startswith("general.")}


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_the_converters_keys(family: str, tmp_path: Path) -> None:
    """Everything that gguf.Metadata, which llama.cpp's converter uses, finds in the folder; and the size."""
    folder = tiny.make(tmp_path / "Tiny-Chat-v1.5", family)
    (folder / "README.md").write_text(CARD)
    (folder / "generation_config.json").write_text(json.dumps({"top_k": 20, "temperature": 0.5, "top_p": 1}))
    export_gguf.run(export_gguf.make_export(open_model(str(folder)), None, tmp_path / "m.gguf"))
    reader = GGUFReader(tmp_path / "m.gguf")
    total = sum(int(one.n_elements) for one in reader.tensors)
    expected = GGUFWriter(None, "llama")
    found = Metadata.load(None, folder, "Tiny-Chat-v1.5", total)
    if found.size_label is None:
        inside = sum(int(one.n_elements) for one in reader.tensors if "_exps" in one.name)
        found.size_label = gguf.size_label(total, total - inside, inside // 4, 4 if inside else 0)
    found.set_gguf_meta_model(expected)
    theirs = {key: value.value for key, value in expected.kv_data[0].items() if key != "general.architecture"}
    mine = keys(tmp_path / "m.gguf")
    assert all(mine[key] == (pytest.approx(value) if isinstance(value, float) else value)
               for key, value in theirs.items())
    assert {"general.license", "general.tags", "general.languages", "general.base_model.0.name", "general.basename",
            "general.version", "general.size_label", "general.sampling.top_k", "general.sampling.temp"} <= set(mine)
    assert mine["general.languages"] == ["en", "no"] and mine["general.sampling.top_p"] == 1.0
    assert mine["general.size_label"].startswith("4x") == (family == "mixtral")
    assert set(mine) - set(theirs) == {"general.architecture", "general.type", "general.file_type",
                                       "general.quantization_version"}


@pytest.mark.parametrize("card", [
    "---\na: &a [x, x]\nb: [*a, *a]\ntags: [t]\n---\n", "---\nlicense: {a: b}\ntags: [1, [2]]\nlanguage: []\n---\n",
    "---\nlicense: \"\\ud800\"\nname: \"a\\x1b[2J\"\n---\n", "---\n" + "[" * 3000 + "\n---\n", "no front",
    "---\n",
    "---\nlicense: !!python/object:os.system x\n---\n", "---\nbase_model: [\"http://a b/\", \"///\", \"-\"]\n---\n"])
def test_cards_of_strange_things(card: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(card)
    (tmp_path / "generation_config.json").write_text('{"top_k": -1, "top_p": NaN, "temperature": [1], "min_p": 1e400}')
    writer = GGUFWriter(None, "llama")
    gguf_general.add(writer, tmp_path, {"_name_or_path": ["x"]}, "name", {"model.norm.weight": (3000,)})
    made = {key: value.value for key, value in writer.kv_data[0].items()}
    assert made["general.name"] == "name" and made["general.size_label"] == "3.0K"
    assert not {"general.license", "general.tags", "general.languages"} & set(made)
    assert not any(key.startswith("general.sampling") for key in made)
    (tmp_path / "README.md").unlink()
    (tmp_path / "README.md").mkdir()
    gguf_general.add(GGUFWriter(None, "llama"), tmp_path, {}, "name", {})
