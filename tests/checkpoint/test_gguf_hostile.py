"""GGUF files that must not open, and the message that each gets."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qtool.checkpoint import open_checkpoint
from qtool.checkpoint.gguf_header import MAX_ITEMS, read_gguf_header
from qtool.errors import CheckpointError
from tests.checkpoint.gguf_maker import convert, refused

# Metadata that make no model


def _rewrite(source: Path, out: Path, **changes: Any) -> Path:
    """Copy a GGUF file with other metadata: key (__ for a dot) -> a value, or None to leave it out."""
    old = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(out, str(changes.pop("architecture", "llama")))
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    values = {field.name: (field.types, field.contents()) for field in old.fields.values()
              if not field.name.startswith("GGUF.") and field.name != "general.architecture"}
    for name, (types, value) in values.items():
        if name not in changes:
            writer.add_key_value(name, value, types[0], types[1] if len(types) > 1 else None)
    for name, value in changes.items():
        if value is not None:
            item = gguf.GGUFValueType.get_type(value[0]) if isinstance(value, list) else None
            writer.add_key_value(name, value, gguf.GGUFValueType.get_type(value), item)
    for tensor in old.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


@pytest.mark.parametrize(("changes", "text"), [
    ({"architecture": "mamba"}, "architecture 'mamba' are not supported .supported: llama, qwen2"),
    ({"general__type": "adapter"}, "holds no model, but adapter"),
    ({"split__count": 3}, "one of 3 parts of a model; join them.*llama-gguf-split"),
    ({"llama__block_count": None}, "llama.block_count is absent, not one positive number"),
    ({"llama__block_count": 1 << 30}, "llama.block_count is 1073741824, but there are 21 tensors"),
    ({"llama__block_count": "many"}, "llama.block_count is 'many'"),
    ({"llama__block_count": [1, 2]}, "llama.block_count is .1, 2."),
    ({"llama__embedding_length": None}, "llama.embedding_length is absent"),
    ({"llama__context_length": 0}, "llama.context_length is 0"),
    ({"llama__attention__head_count": -4}, "llama.attention.head_count is -4"),
    ({"llama__attention__head_count": 3}, "do not divide into 3 heads"),
    ({"llama__attention__layer_norm_rms_epsilon": None}, "rms_epsilon is None"),
    ({"llama__attention__layer_norm_rms_epsilon": float("nan")}, "rms_epsilon is nan"),
    ({"llama__rope__dimension_count": 8}, "rotates 8 of 16 elements per head, which llama"),
    ({"llama__rope__dimension_count": 80}, "rotates 80 of 16"),
    ({"llama__rope__freq_base": "fast"}, "per head by 'fast'"),
    ({"tokenizer__ggml__tokens": 5}, "tokenizer.ggml.tokens or .merges is not a list of texts"),
    ({"tokenizer__ggml__tokens": ["a", "b"]}, "does not join two tokens to a third"),
    ({"tokenizer__ggml__merges": ["a"]}, "merge 'a' does not join"),
    ({"tokenizer__ggml__merges": ["a b c"]}, "merge 'a b c' does not join"),
    ({"tokenizer__ggml__bos_token_id": 4000}, "tokenizer.ggml.bos_token_id is 4000, and there are 512 tokens"),
    ({"tokenizer__ggml__token_type": [1]}, "tokenizer.ggml.token_type does not give one number per token"),
    ({"tokenizer__ggml__model": "strange"}, "the metadata make no usable tokenizer: .*strange"),
    ({"tokenizer__ggml__model": "llama", "tokenizer__ggml__merges": None}, "no usable tokenizer: 'scores'"),
    ({"tokenizer__ggml__model": "t5", "tokenizer__ggml__tokens": ["a"], "tokenizer__ggml__scores": [0.0],
      "tokenizer__ggml__merges": None, "tokenizer__ggml__token_type": None, "tokenizer__ggml__eos_token_id": 0},
     "no usable tokenizer: .*unk_id"),  # an Exception of no class
])
def test_metadata_that_make_no_model(small: Path, tmp_path: Path, changes: dict[str, Any], text: str) -> None:
    refused(_rewrite(small, tmp_path / "odd.gguf", **changes), text)


def test_a_file_without_vocabulary_still_gives_tensors(llama: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(convert(llama, tmp_path / "m.gguf", "llama", tokens=False)))
    assert checkpoint.companions() == [] and checkpoint.config["bos_token_id"] is None


def test_tensors_without_a_place(llama: Path, tmp_path: Path) -> None:
    extra = {"blk.0.ssm_a.weight": np.zeros((2, 2), np.float32)}
    refused(convert(llama, tmp_path / "m.gguf", "llama", extra=extra), "'blk.0.ssm_a.weight' has no place in a llama")
    extra = {"blk.0.attn_k.bias": np.zeros(31, np.float32)}
    refused(convert(llama, tmp_path / "n.gguf", "llama", extra=extra), "31 rows of tensor 'blk.0.attn_k.bias' do not")


def test_a_type_that_cannot_be_decoded(llama: Path, tmp_path: Path) -> None:
    extra = {"blk.0.attn_k.bias": np.zeros(32, np.int32)}
    refused(convert(llama, tmp_path / "m.gguf", "llama", extra=extra), "'blk.0.attn_k.bias' has type I32, which gguf")


# Damaged and hostile files


def header(tensors: int = 0, keys: int = 0, rest: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + rest


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def info(name: bytes = b"t", dims: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


@pytest.mark.parametrize(("content", "message"), [
    (b"", "the file is empty"),
    (b"GG", "truncated inside the magic number"),
    (b"\x80\x04}q\x00.", "begins with b'.x80.x04}q', not with GGUF"),
    (header(version=1), "GGUF version 1"),
    (header(version=0x03000000), "version 50331648, possibly big-endian"),
    (b"GGUF" + struct.pack("<I", 3), "truncated inside the number of tensors"),
    (header(tensors=1 << 60), "announces 1152921504606846976 tensors, more than a file of 24 bytes can hold"),
    (header(keys=1 << 60), "announces 1152921504606846976 keys"),
    (header(keys=1, rest=struct.pack("<Q", 1 << 62) + bytes(16)), "key 0 announces 4611686018427387904 bytes"),
    (header(keys=1, rest=text(b"\xff\xfe") + bytes(8)), "key 0 is not UTF-8"),
    (header(keys=1, rest=text(b"k") + struct.pack("<I", 99)), "key 'k' has the unknown type 99"),
    (header(keys=1, rest=text(b"k") + struct.pack("<IQ", 8, 1 << 40)), "announces 1099511627776 bytes"),
    (header(keys=1, rest=text(b"k") + struct.pack("<IIQ", 9, 4, 1 << 50)), "announces 1125899906842624 items in key"),
    (header(keys=1, rest=text(b"k") + struct.pack("<IIQ", 9, 8, 1 << 50)), "announces 1125899906842624 items in key"),
    (header(keys=1, rest=text(b"k") + struct.pack("<IIQ", 9, 0, MAX_ITEMS) + bytes(MAX_ITEMS)), "or any model needs"),
    (header(keys=1, rest=text(b"k") + struct.pack("<IIQ", 9, 9, 1) + bytes(16)), "key 'k' is an array of type 9"),
    (header(keys=2, rest=(text(b"k") + struct.pack("<II", 4, 1)) * 2), "key 'k' is given twice"),
    (header(keys=1, rest=text(b"general.alignment") + struct.pack("<II", 4, 3)), "general.alignment is 3, not a power"),
    (header(keys=1, rest=text(b"general.alignment") + struct.pack("<IQ", 8, 1) + b"x"), "general.alignment is x"),
    (header(tensors=1, rest=info(dims=()) + bytes(64)), "tensor 't' has 0 dimensions"),
    (header(tensors=1, rest=info(dims=(1,) * 5)), "tensor 't' has 5 dimensions"),
    (header(tensors=1, rest=info(name=b"a\nb")), "or an unusable name"),
    (header(tensors=1, rest=info(kind=4711)), "tensor 't' has the unknown type 4711"),
    (header(tensors=1, rest=info(dims=(1 << 32, 1 << 32))), "overflows"),
    (header(tensors=1, rest=info(dims=(0, 32))), "is empty or overflows"),
    (header(tensors=1, rest=info(dims=(33,), kind=2)), "rows of 33 do not divide into Q4_0 blocks of 32"),
    (header(tensors=1, rest=info(offset=1 << 63)), "overflows"),
    (header(tensors=1, rest=info(offset=8) + bytes(256)), "begins at 8, which is no multiple of 32"),
    (header(tensors=2, rest=info() * 2 + bytes(256)), "tensor 't' is given twice"),
    (header(tensors=2, rest=info() + info(b"u") + bytes(256)), "tensors 't' and 'u' overlap"),
    (header(tensors=1, rest=info() + bytes(100)), "truncated: tensor 't' ends at byte"),
    (header(), "holds no model, but model, and 0 tensors"),
])
def test_hostile_files(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "bad.gguf").write_bytes(content)
    refused(tmp_path / "bad.gguf", message)


@pytest.mark.parametrize("keep", [30, 500, 5000, 20000, -1])
def test_truncated_anywhere(small: Path, tmp_path: Path, keep: int) -> None:
    (tmp_path / "cut.gguf").write_bytes(small.read_bytes()[:keep])
    refused(tmp_path / "cut.gguf", "truncated")


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=8)), min_size=1, max_size=3))
def test_mutated_files_give_a_checkpoint_error_or_open(small: Path, tmp_path: Path,
                                                       changes: list[tuple[float, bytes]]) -> None:
    """Never another exception. Only the header is touched; what lies in the data are just other weights."""
    content = bytearray(small.read_bytes())
    end = read_gguf_header(small).tensors["token_embd.weight"].offset
    for share, replacement in changes:
        place = int(share ** 4 * (end - 8))  # mostly the scalars, seldom the vocabulary
        content[place:place + len(replacement)] = replacement
    path = tmp_path / "mutated.gguf"
    path.write_bytes(bytes(content))
    try:
        checkpoint = open_checkpoint(str(path), work_dir=tmp_path / "work")
    except CheckpointError as error:
        assert str(path) in str(error)
    else:
        checkpoint.read("model.norm.weight")


def test_shortened_while_open(small: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(small.read_bytes())
    checkpoint = open_checkpoint(str(path))
    path.write_bytes(small.read_bytes()[:-4096])
    with pytest.raises(CheckpointError, match="tensor .* cannot be read: the file became shorter"):
        for name in checkpoint.specs:
            checkpoint.read(name)
