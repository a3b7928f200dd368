"""Changes of JSON: one node becomes another, a key is lost, renamed, added or there twice; and of plain bytes."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

NUMBERS = [
    0, 1, -1, 2, 3, 255, 65536, 14000, 2_000_000, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, 10**400, -(2**63),
    0.5, -0.0, 1e-320, 1e39, 1e308, float("nan"), float("inf"), float("-inf"),
]  # fmt: skip
TEXTS = [
    "", " ", "0", "auto", "null", "demo", "x" * 200_000, "\ud800", "a\u0000b", "\u202e\u0007\x1b[31m", "é" * 300,
    "../../x",
    "/etc/passwd", "/dev/zero", "~", "~root", ".", "..", "-o", "model.safetensors", "config.json", "{{ 1/0 }}", "%s%n",
    "{% for i in range(999999999) %}x{% endfor %}", "torch.float16", "float8_e4m3fn", "qe-edge", "<|image_pad|>",
]  # fmt: skip


class Pairs(list[tuple[str, Any]]):
    """A JSON table in which a key may stand twice."""


def change_bytes(data: bytes, rng: random.Random) -> bytes:
    """Bytes are cut, added, moved, overwritten or flipped."""
    if not data:
        return rng.randbytes(8)
    start = rng.randrange(len(data)) if rng.random() < 0.7 else rng.randrange(min(len(data), 64))
    length = min(rng.choice((1, 1, 2, 8, 100, 5000)), len(data) - start)
    before, piece, after = data[:start], data[start : start + length], data[start + length :]
    other = rng.randrange(len(data))
    flipped = bytes(sign ^ (1 << rng.randrange(8)) for sign in piece[:4]) + piece[4:]
    return rng.choice((
        before,
        before + rng.randbytes(length) + piece + after,
        before + after,
        before + piece * 3 + after,
        before + rng.choice((b"\0", b"\xff", b" ", b"9")) * length + after,
        before + data[other : other + length] + after,
        rng.choice((b"\xef\xbb\xbf", b"\xff\xfe", b"\0")) + data,
        data + rng.randbytes(length),
        before + flipped + after,
        before + flipped + after,
    ))  # fmt: skip


def change_json(data: bytes, rng: random.Random) -> bytes:
    """One node of a JSON text becomes another; a text that is none changes as bytes."""
    try:
        return dump_json(change_values(json.loads(data), rng)).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError):
        return change_bytes(data, rng)


def change_json_line(data: bytes, rng: random.Random) -> bytes:
    """One line of JSONL changes."""
    lines = data.split(b"\n")
    at = rng.randrange(len(lines))
    lines[at] = change_json(lines[at], rng)
    return b"\n".join(lines)


def change_values(values: Any, rng: random.Random) -> Any:  # noqa: ANN401 - any JSON value
    """The values with one node changed."""
    nodes = list(_nodes(values, []))
    if not nodes:
        return _other(values, rng, [values])
    holder, key = rng.choice(nodes)
    others = [at[name] for at, name in nodes]
    if isinstance(holder, dict) and rng.random() < 0.3:
        match rng.randrange(5):
            case 0:
                del holder[key]
            case 1:
                holder[key + rng.choice(("s", "_", " ", "\u0000"))] = holder.pop(key)
            case 2:
                holder[rng.choice(("unknown", "auto_map", "quantization_config", "torch_dtype", "__class__"))] = 1
            case 3:
                return _with_twice(values, holder, key, _other(holder[key], rng, others))
            case _:
                holder[key.upper()] = holder.pop(key)
    else:
        holder[key] = _other(holder[key], rng, others)
    return values


def _nodes(values: Any, found: list[Any]) -> list[Any]:  # noqa: ANN401
    """Every table or list with every of its keys, at most 3000; long lists are sampled from their start."""
    items = values.items() if isinstance(values, dict) else enumerate(values[:50]) if isinstance(values, list) else ()
    for key, value in items:
        if len(found) < 3000:
            found.append((values, key))
            _nodes(value, found)
    return found


def _with_twice(values: Any, holder: Any, key: str, second: Any) -> Any:  # noqa: ANN401
    if values is holder:
        return Pairs([*values.items(), (key, second)])
    if isinstance(values, dict):
        return Pairs([(name, _with_twice(value, holder, key, second)) for name, value in values.items()])
    if isinstance(values, list):
        return [_with_twice(value, holder, key, second) for value in values]
    return values


def _other(value: Any, rng: random.Random, others: list[Any]) -> Any:  # noqa: ANN401, PLR0911
    kind = rng.random()
    if kind < 0.15:
        return copy.deepcopy(rng.choice(others))  # one that holds this node would hold itself
    if kind < 0.25:
        return rng.choice((None, True, False, [], {}, [[]], {"a": {}}, [value], {"a": value}, _times([value], 1000)))
    if kind < 0.3:
        return _deep(rng.choice((40, 100, 2000)), rng)
    if isinstance(value, bool):
        return rng.choice((not value, 1, "true", None))
    if isinstance(value, int | float) and kind < 0.7:
        if value > 1e300 or value < -1e300:  # the next number would be none, of a float or of its text
            return rng.choice((-value, [value], 1.5, 0))
        near = [value + 1, value - 1, -value, value * 2, value * 1000, value // 2, float(value), str(value), [value]]
        return rng.choice(near)
    if isinstance(value, list) and value and kind < 0.7:
        return rng.choice((value[:-1], value[1:], value + value, value[::-1], _times(value, 50), value[:1]))
    if isinstance(value, str) and value and kind < 0.5:
        return rng.choice((value[:-1], value + "x", value.upper(), value * 2, f"../{value}", f"/{value}", list(value)))
    return rng.choice(NUMBERS) if kind < 0.8 else rng.choice(TEXTS)


def _times(values: list[Any], count: int) -> list[Any]:
    """A list again and again, to a text of two million signs at most."""
    return values * min(count, 2_000_000 // max(len(repr(values)), 1))


def _deep(levels: int, rng: random.Random) -> Any:  # noqa: ANN401
    value: Any = 1
    for _ in range(levels):
        value = [value] if rng.random() < 0.5 else {"a": value}
    return value


def dump_json(value: Any) -> str:  # noqa: ANN401
    """JSON of values in which tables may be `Pairs`; nesting has no limit."""
    parts: list[str] = []
    stack: list[Any] = [value]
    while stack:
        top = stack.pop()
        if isinstance(top, _Raw):
            parts.append(top)
        elif isinstance(top, Pairs | dict):
            items = list(top if isinstance(top, Pairs) else top.items())
            inside: list[Any] = [_Raw("{")]
            for number, (key, item) in enumerate(items):
                inside += [_Raw(("," if number else "") + json.dumps(str(key)) + ":"), item]
            stack += reversed([*inside, _Raw("}")])
        elif isinstance(top, list):
            inside = [_Raw("[")]
            for number, item in enumerate(top):
                inside += [_Raw("," if number else ""), item]
            stack += reversed([*inside, _Raw("]")])
        elif isinstance(top, int) and not isinstance(top, bool):
            parts.append(str(top) if abs(top) < 10**300 else "9" * 400)
        else:
            parts.append(json.dumps(top))
    return "".join(parts)


class _Raw(str):
    """Text that is JSON already."""

    __slots__ = ()
