"""Ways in which a file becomes hostile or unlucky: JSON, YAML, safetensors, ONNX, PNG, and what lies at its path."""

from __future__ import annotations

import json
import os
import random
import struct
import zlib
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from tests.fuzz.json_changes import change_bytes, change_json, change_json_line, change_values, dump_json

Data = Callable[[bytes, random.Random], bytes]

PLACES = ("missing", "empty", "folder", "fifo", "loop", "dangling", "device", "link outside", "unreadable")
YAML_BOMBS = [
    "a: &a [x, x]\n" + "".join(f"{to}: &{to} [{', '.join([f'*{of}'] * 9)}]\n" for of, to in pairwise("abcdefghij")),
    "a: &a {k: 1}\n" + "".join(f"b{i}: &b{i} {{<<: [{', '.join(['*a'] * 40)}], k{i}: 1}}\n" for i in range(40)),
    "options: &o\n  tokens: *o\n", "? [a, b]\n: c\n", "method: !!python/object/apply:os.system [id]\n",
    "seed: 0o17\n", "seed: 1_000\nscheme: 4e2\n", "seed: 2001-01-01\n", "<<: {method: rtn}\n", "--- a\n--- b\n",
    "%YAML 9.9\n---\na: 1\n", "method: rtn\nmethod: gptq\n", "options: {<<: [1, 2]}\n", "seed: .nan\n",
    "modules: !!set {language}\n", "\ufeffseed: 1\n", "[" * 3000, "{a: " * 2000, "seed: " + "9" * 5000 + "\n",
    "true: 1\n", "1: 2\n", "null: 3\n", "seed: !!binary aGk=\n",
]  # fmt: skip


def change_file(path: Path, rng: random.Random) -> str:
    """Change one file, or what lies at its path; returns what was done, in words."""
    if rng.random() < 0.06:
        return _change_place(path, rng)
    data = path.read_bytes()
    choices = [change_bytes, *_by_suffix(path)]
    change = rng.choice(choices if rng.random() < 0.75 else choices[-1:])
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        data = change(data, rng)
    path.write_bytes(data)
    return f"{change.__name__.strip('_')} {path.name}"


def _by_suffix(path: Path) -> list[Data]:
    return {
        ".json": [change_json],
        ".jsonl": [change_json_line],
        ".yaml": [_change_yaml],
        ".safetensors": [_change_safetensors],
        ".onnx": [_change_onnx],
        ".png": [_change_png],
    }.get(path.suffix, [])


def _change_place(path: Path, rng: random.Random) -> str:
    """No file, or something that is none."""
    what = rng.choice(PLACES)
    kept = path.read_bytes()
    path.unlink()
    match what:
        case "empty":
            path.touch()
        case "folder":
            path.mkdir()
        case "fifo":
            os.mkfifo(path)
        case "loop":
            path.symlink_to(path)
        case "dangling":
            path.symlink_to("no-such-file")
        case "device":
            path.symlink_to("/dev/zero")
        case "link outside":
            outside = path.parent.with_name("outside")
            outside.write_bytes(kept)
            path.symlink_to(outside)
        case "unreadable":
            path.write_bytes(kept)
            path.chmod(0)
    return f"{what}: {path.name}"


def _change_yaml(data: bytes, rng: random.Random) -> bytes:
    import yaml

    if rng.random() < 0.4:
        bomb = rng.choice(YAML_BOMBS).encode("utf-8", "surrogatepass")
        return rng.choice((bomb, data + bomb, bomb + data))
    try:
        _refuse_bombs(data)
        values = json.loads(json.dumps(yaml.safe_load(data), default=str))
        return dump_json(change_values(values, rng)).encode("utf-8", "surrogatepass")
    except (yaml.YAMLError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError):
        return change_bytes(data, rng)  # no YAML, or keys and values that JSON does not have


def _refuse_bombs(data: bytes) -> None:
    """ValueError for YAML that stands for more than fits into memory, or nests so deeply that PyYAML takes minutes."""
    import yaml

    depth = 0
    for event in yaml.parse(data):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent) or depth > 100:
            raise ValueError("an alias, or too deep")


def _change_safetensors(data: bytes, rng: random.Random) -> bytes:
    if len(data) < 8:
        return change_bytes(data, rng)
    size = struct.unpack("<Q", data[:8])[0]
    if rng.random() < 0.1:
        return struct.pack("<Q", rng.choice((0, 1, size + 1, size - 1, 2**40, 2**63, 2**64 - 1)) % 2**64) + data[8:]
    if rng.random() < 0.25:  # values become others, or no numbers
        start = 8 + size + rng.randrange(max(len(data) - 8 - size, 1))
        return data[:start] + rng.choice((b"\xff\x7f", b"\0\0", b"\x80\x7f", rng.randbytes(2))) + data[start + 2 :]
    header = change_json(data[8 : 8 + size], rng)
    return struct.pack("<Q", len(header)) + header + data[8 + size :]


def _change_png(data: bytes, rng: random.Random) -> bytes:
    """Another header with a right checksum, or other bytes."""
    if rng.random() < 0.5 or len(data) < 33:
        return change_bytes(data, rng)
    width, height, *others = struct.unpack(">IIBBBBB", data[16:29])
    sizes = (0, 1, 3, 9400, 30000, 2**31 - 1, width, height)
    others[0], others[1] = rng.choice((1, 2, 4, 8, 16, others[0])), rng.choice((0, 2, 3, 4, 6, others[1]))
    header = b"IHDR" + struct.pack(">IIBBBBB", rng.choice(sizes), rng.choice(sizes), *others)
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


def _change_onnx(data: bytes, rng: random.Random) -> bytes:
    """One part of a graph becomes another; bytes that are no graph change as bytes."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.ModelProto.FromString(data)
    except DecodeError:
        return change_bytes(data, rng)
    if model.graph.node:
        rng.choice((_change_external, _change_initializer, _change_node, _change_node, _change_version))(model, rng)
    return bytes(model.SerializeToString())


def _change_external(model: Any, rng: random.Random) -> None:  # noqa: ANN401 - protobuf has no types
    """Where the values of a tensor lie."""
    stored = [tensor for tensor in model.graph.initializer if tensor.external_data]
    places = ("../outside", "/etc/passwd", "/dev/zero", "", ".", "x" * 5000, "manifest.json")
    for entry in rng.choice(stored).external_data if stored else ():
        if rng.random() < 0.5:
            numbers = ("-1", "x", "", str(2**63), str(2**64), "1e9", "0")
            entry.value = rng.choice(places if entry.key == "location" else numbers)


def _change_initializer(model: Any, rng: random.Random) -> None:  # noqa: ANN401
    for tensor in rng.choices(model.graph.initializer, k=1) if model.graph.initializer else ():
        tensor.dims[:] = rng.choice(([], [0], [-1], [2**40, 2**40], [1] * 40, [*tensor.dims, 2]))
        tensor.data_type = rng.choice((tensor.data_type, 0, 8, 99))


def _change_node(model: Any, rng: random.Random) -> None:  # noqa: ANN401
    """A node is lost, another operator, reads something else, or has other attributes."""
    nodes = model.graph.node
    node, other = rng.choice(nodes), rng.choice(nodes)
    what = rng.randrange(4)
    if what == 0:
        nodes.remove(node)
    elif what == 1:
        node.op_type = rng.choice(("Loop", "Scan", "Sin", "", "NoSuchOp", "MatMul", "QELinear"))
    elif what == 2 and node.input:
        node.input[rng.randrange(len(node.input))] = rng.choice(("", "nothing", *node.output, *other.output))
    for attribute in node.attribute if what == 3 else ():
        attribute.i = rng.choice((-1, 0, 7, 2**62))
        attribute.type = rng.choice((attribute.type, 0, 1, 2, 3, 7))


def _change_version(model: Any, rng: random.Random) -> None:  # noqa: ANN401
    model.ir_version = rng.choice((0, 3, 99, model.ir_version))
    for opset in model.opset_import:
        opset.version = rng.choice((0, 1, 999, opset.version))
        opset.domain = rng.choice((opset.domain, opset.domain, "other"))
