"""Damage that knows the structure of what it damages: JSON, YAML and little-endian binary formats.

A document is mutated as a tree (numbers become extremes, types are swapped, keys dropped, doubled or renamed, values
spliced from elsewhere in it) and then, sometimes, as text (bits flipped, pieces cut out, doubled or overwritten).
Everything is drawn from the given random, so hypothesis can repeat and shrink it.
"""

from __future__ import annotations

import json
import struct
from copy import deepcopy
from random import Random
from typing import Any

EXTREMES: tuple[Any, ...] = (
    0, 1, -1, 2, 255, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30, 0.5, 1e-300, 1e308,
    float("nan"), float("inf"), -float("inf"), True, False, None, "", "x", "a" * 300, "\x1b[31mred", "\ud800", "../x",
    "/etc/passwd", "\u202e", "4", "NaN", "__class__", "{}", [], {}, [[]], [None], {"a": {}}, [0] * 70, "0" * 5000)
TOKENS = (b"", b"0", b"9", b"-", b"{", b"}", b'"', b",", b":", b"\\", b"e9", b"[[", b"\x00", b"\xff", b"\xed\xa0\x80",
          b"18446744073709551616", b'"a":1,', b"NaN", b"null", b"\\ud800", b"\n", b"[" * 3000, b'{"a":' * 3000)
YAML = (b"!!python/object/apply:os.system [x]\n", b"&a ", b"*a", b"<<: ", b"? [a]\n: b\n", b"- ", b"|\n", b">\n",
        b"%YAML 9.9\n", b"---\n", b"...\n", b"\t", b"!!int x", b"!!binary x", b"!!set {a}", b"! x", b"1:30:00",
        b"2001-99-99", b"0o8", b"0x", b".inf", b".nan", b"~", b"yes", b"'", b'"\\e[31m"', b"#", b"a: 1\n", b"9" * 5000,
        b"[" * 200, b"{a: " * 200, b"08")
INTEGERS = (0, 1, 2, 3, 7, 31, 255, 256, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1)


def document(random: Random, value: Any, changes: int = 4) -> bytes:
    """Some text near the JSON of `value`; not always JSON."""
    tree = _pairs(value)
    for _ in range(random.randint(1, changes)):
        tree = _changed(random, tree)
    text = _dumped(tree).encode("utf-8", "surrogatepass")
    return content(random, text, TOKENS) if random.randint(0, 3) == 0 else text


def content(random: Random, data: bytes, tokens: tuple[bytes, ...] = TOKENS) -> bytes:
    """`data` with a few pieces changed."""
    for _ in range(random.randint(1, 3)):
        place = random.randint(0, len(data))
        size = random.choice((0, 1, 2, 4, 8, 40))
        how = random.randint(0, 6)
        if how == 0 and data:
            place %= len(data)
            data = data[:place] + bytes([data[place] ^ (1 << random.randint(0, 7))]) + data[place + 1:]
        elif how == 1:
            data = data[:place]
        elif how == 2:
            data = data[:place] + data[place + size:]
        elif how == 3:
            data = data[:place] + data[place:place + size] * 2 + data[place + size:]
        elif how == 4:
            number = random.choice(INTEGERS).to_bytes(8, "little")[:random.choice((4, 8))]
            data = data[:place] + number + data[place + len(number):]
        else:
            data = data[:place] + random.choice(tokens) + data[place + random.choice((0, size)):]
    return data


def binary(random: Random, chunks: list[Any]) -> bytes:
    """A file of little-endian fields, (struct code, number) or bytes, with some of them changed.

    A field keeps its width, so that what comes after it is still found where it was.
    """
    chunks = list(chunks)
    for _ in range(random.randint(1, 3)):
        place = random.randint(0, len(chunks) - 1)
        how = random.randint(0, 9)
        if how < 6 and isinstance(chunks[place], tuple):
            code = chunks[place][0]
            limit = 1 << 8 * struct.calcsize("<" + code)
            chunks[place] = (random.choice(INTEGERS) % limit).to_bytes(struct.calcsize("<" + code), "little")
        elif how < 6:
            chunks[place] = content(random, packed([chunks[place]]), TOKENS)
        elif how == 6:
            del chunks[place]
        elif how == 7:
            chunks.insert(place, chunks[random.randint(0, len(chunks) - 1)])
        elif how == 8:
            other = random.randint(0, len(chunks) - 1)
            chunks[place], chunks[other] = chunks[other], chunks[place]
        else:
            del chunks[random.randint(0, len(chunks) - 1):]
        if not chunks:
            return b""
    return packed(chunks)


def packed(chunks: list[Any]) -> bytes:
    return b"".join(one if isinstance(one, bytes) else struct.pack("<" + one[0], one[1]) for one in chunks)


class _Pairs(list):  # type: ignore[type-arg]
    """The members of a JSON object, in which a key may be doubled."""


def _pairs(value: Any) -> Any:
    if isinstance(value, dict):
        return _Pairs((key, _pairs(item)) for key, item in value.items())
    return [_pairs(item) for item in value] if isinstance(value, list) else value


def _places(tree: Any, path: tuple[int, ...] = ()) -> list[tuple[int, ...]]:
    found = [path]
    if isinstance(tree, list):
        for index, item in enumerate(tree):
            found += _places(item[1] if isinstance(tree, _Pairs) else item, (*path, index))
    return found


def _at(tree: Any, path: tuple[int, ...]) -> Any:
    for index in path:
        tree = tree[index][1] if isinstance(tree, _Pairs) else tree[index]
    return tree


def _changed(random: Random, tree: Any) -> Any:
    places = _places(tree)
    path = places[random.randint(0, len(places) - 1)]
    if not path:
        return _pairs(random.choice(EXTREMES)) if random.randint(0, 9) == 0 else tree
    holder, index, how = _at(tree, path[:-1]), path[-1], random.randint(0, 9)
    old = holder[index][1] if isinstance(holder, _Pairs) else holder[index]
    if how < 5:
        new = deepcopy(_pairs(random.choice(EXTREMES)))
    elif how == 5:
        new = _at(tree, places[random.randint(0, len(places) - 1)])
        new = deepcopy(new) if len(_places(new)) < 200 else None
    elif how == 6:
        new = _near(random, old)
    elif how == 7:
        del holder[index]
        return tree
    elif how == 8:
        holder.insert(random.randint(0, len(holder)), deepcopy(holder[index]))
        return tree
    elif isinstance(holder, _Pairs):
        holder[index] = (random.choice(("", "a", "\x1b[1m", holder[index][0] + "x", "../x", "__metadata__")), old)
        return tree
    else:
        new = [old]
    holder[index] = (holder[index][0], new) if isinstance(holder, _Pairs) else new
    return tree


def _near(random: Random, value: Any) -> Any:
    """Almost the same value, or the same as another type."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, (int, float)):
        return random.choice((value + 1, value - 1, -value, value * 2, str(value), float(value), [value]))
    if isinstance(value, str):
        return random.choice((value + "x", value[:-1], value.upper(), [value], _Pairs([(value, value)]), value * 3))
    return random.choice((type(value)(reversed(value)), [], str(len(value))))


def _dumped(tree: Any) -> str:
    if isinstance(tree, _Pairs):
        return "{" + ", ".join(f"{json.dumps(key)}: {_dumped(item)}" for key, item in tree) + "}"
    if isinstance(tree, list):
        return "[" + ", ".join(map(_dumped, tree)) + "]"
    return json.dumps(tree)
