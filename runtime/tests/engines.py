"""Engine folders for the stand-in of TensorRT: their engines are JSON files that name graphs beside the folder."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from test_answers import ROOT

MAKE = """
import pathlib, sys
from tests.runtime.host_tensorrt import lowered_engines
out = pathlib.Path(sys.argv[2])
for kind in ("in_place", "two_caches"):
    (out / kind).mkdir()
    lowered_engines(pathlib.Path(sys.argv[1]), out / kind / "engines", in_place=kind == "in_place")
"""
Change = Callable[[dict[str, Any]], object]


def make_engines(folder: Path, out: Path) -> dict[str, Path]:
    """The demo's engine folders: one with a cache "in_place" and one of "two_caches"."""
    subprocess.run([sys.executable, "-c", MAKE, str(folder), str(out)], cwd=ROOT, check=True)
    made = {kind.name: kind / "engines" for kind in out.iterdir()}
    for engines in made.values():
        _name_graphs(engines)
    return made


def write_again(engines: Path, manifest: Change | None = None, info: Change | None = None) -> None:
    """Describe a folder as it is now, its manifest and engine.json changed first."""
    path = engines / "manifest.json"
    table = json.loads(path.read_text())
    if manifest is not None:
        manifest(table)
    table["files"] = {
        found.name: {"size": found.stat().st_size, "sha256": hashlib.sha256(found.read_bytes()).hexdigest()}
        for found in engines.iterdir()
        if found.name not in ("manifest.json", "engine.json")
    }
    digest = _seal(path, table)
    build = json.loads((engines / "engine.json").read_text()) | {"manifest": digest}
    if info is not None:
        info(build)
    _seal(engines / "engine.json", build)


def edit_plan(engines: Path, name: str, change: Change) -> None:
    """Make an engine another one than its manifest says."""
    path = engines / f"{name}.engine"
    plan = json.loads(path.read_text())
    change(plan)
    path.write_text(json.dumps(plan))
    write_again(engines)


def environment(build: Path, onnxruntime: Path, **further: str) -> dict[str, str]:
    """Where programs find the stand-ins of the driver and of TensorRT."""
    return os.environ | {
        "LD_LIBRARY_PATH": str(build / "tests/standin"),
        "STANDIN_ONNXRUNTIME": str(onnxruntime),
        **further,
    }


def _name_graphs(engines: Path) -> None:
    """Move the graphs out of a folder; its engines name them."""
    graphs = engines.parent / "graphs"
    graphs.mkdir()
    for name, entry in json.loads((engines / "manifest.json").read_text())["graphs"].items():
        shutil.move(engines / entry["file"], graphs / f"{name}.onnx")
        plan = {key: entry[key] for key in ("inputs", "outputs")} | {"profiles": list(entry["profiles"].values())}
        (engines / entry["file"]).write_text(json.dumps(plan | {"graph": str(graphs / f"{name}.onnx")}))
        (engines / f"{name}.onnx").unlink()
        (engines / f"{name}.onnx.data").unlink(missing_ok=True)
    write_again(engines)


def _seal(path: Path, table: dict[str, Any]) -> str:
    content = {name: value for name, value in table.items() if name != "digest"}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    path.write_text(json.dumps({"digest": digest, **content}))
    return digest
