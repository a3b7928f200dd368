"""Targets: exported and built folders, read by running and building, and what describes a model to `predict`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from unittest import mock

import numpy as np

from qe_edge.calibration.sources import load_samples
from tests.fuzz.target import SilentSuccessError, Target, digest


def _prepare_onnx(folder: Path, sound: Mapping[str, Path]) -> None:
    from qe_edge.export.exporter import export_model

    export_model(sound["checkpoint"] / "checkpoint", folder / "onnx")


def _copy(name: str) -> Callable[[Path, Mapping[str, Path]], object]:
    return lambda folder, sound: shutil.copytree(sound[name] / name, folder / name)


def _prepare_engines(folder: Path, sound: Mapping[str, Path]) -> None:
    from qe_edge.export.build import build_engines

    build_engines(sound["onnx"] / "onnx", folder / "engines", "cpu")


def _run(folder: Path) -> str:
    from qe_edge.runtime.engine import VisionLanguageEngine

    engine = VisionLanguageEngine.load(folder, threads=1)
    encoded = engine.encode(load_samples("demo", 1))
    logits = engine.logits(encoded)
    if not np.isfinite(logits).all():
        raise SilentSuccessError("logits are not finite")
    return digest(engine.generate_ids(encoded, 3), logits)


def _build(folder: Path) -> str:
    """`build` for the CPU, and for TensorRT-RTX up to its builder."""
    from qe_edge.export.build import build_engines
    from qe_edge.export.engine import EngineFacts

    build_engines(folder / "onnx", folder / "cpu", "cpu")
    with (
        mock.patch("qe_edge.export.targets.Target.check"),
        mock.patch("qe_edge.export.build.build_engine", return_value=EngineFacts("0")),
    ):
        build_engines(folder / "onnx", folder / "rtx", "rtx")
    return ""


def _prepare_embedding(folder: Path, sound: Mapping[str, Path]) -> None:
    shutil.copy(sound["onnx"] / "onnx" / "embedding.safetensors", folder / "embedding.safetensors")
    manifest = json.loads((sound["onnx"] / "onnx" / "manifest.json").read_text(encoding="utf-8"))
    sizes = {name: manifest[name] for name in ("vocab_size", "hidden_size")}  # no hash: the reader itself is tried
    (folder / "sizes.json").write_text(json.dumps(sizes), encoding="utf-8")


def _read_embedding(folder: Path) -> str:
    from qe_edge.runtime.embedding import TokenEmbedding

    sizes = json.loads((folder / "sizes.json").read_text(encoding="utf-8"))
    embedding = TokenEmbedding(folder, sizes["vocab_size"], sizes["hidden_size"])
    embedding(np.array([[0, 1, sizes["vocab_size"] - 1]]))
    return ""


def _prepare_prediction(folder: Path, sound: Mapping[str, Path]) -> None:
    shutil.copy(sound["model-qwen2-vl"] / "model" / "config.json", folder / "config.json")


def _predict(folder: Path) -> str:
    from qe_edge.numerics.schemes import get_scheme
    from qe_edge.predict.roofline import Request, predict
    from qe_edge.predict.shapes import find_model
    from qe_edge.predict.tables import get_device

    request = Request(
        shape=find_model(str(folder)), device=get_device("orin-nano"), scheme=get_scheme("w4a8"), patches=256,
        prompt=64, context=64, launches="stream",
    )  # fmt: skip
    return digest(repr(predict(request)))


RUN, BUILT = ("onnx/*", "onnx/*.onnx"), ("onnx/*.onnx", "onnx/manifest.json", "onnx/*")
TARGETS = (
    Target("onnx", _prepare_onnx, lambda at: _run(at / "onnx"), RUN, after="checkpoint"),
    Target("engines", _prepare_engines, lambda at: _run(at / "engines"), ("engines/*",), after="onnx"),
    Target("build", _copy("onnx"), _build, BUILT, after="onnx"),
    Target("onnx-sealed", _copy("onnx"), lambda at: _run(at / "onnx"), RUN, after="onnx", sealed="onnx"),
    Target(
        "engines-sealed", _copy("engines"), lambda at: _run(at / "engines"), ("engines/*", "engines/*.json"),
        after="engines", sealed="engines",
    ),
    Target("build-sealed", _copy("onnx"), _build, BUILT, after="onnx", sealed="onnx"),
    Target("embedding", _prepare_embedding, _read_embedding, ("*.safetensors",), after="onnx"),
    Target("prediction", _prepare_prediction, _predict, ("config.json",), after="model-qwen2-vl"),
)  # fmt: skip
