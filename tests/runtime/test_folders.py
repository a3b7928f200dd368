"""Folders that are damaged or made to do harm."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from qe_edge.runtime.embedding import EMBEDDING, TokenEmbedding
from qe_edge.runtime.engine import VisionLanguageEngine
from qe_edge.runtime.engine_info import ENGINE_INFO, EngineInfo, GraphBuild
from qe_edge.runtime.manifest import GRAPHS, Manifest, read_description, read_manifest
from qe_edge.system.errors import ArtifactError, TargetError
from tests.conftest import Exported
from tests.sealing import seal


@pytest.fixture
def folder(exported: Exported, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(exported.onnx, tmp_path / "onnx"))


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "manifest.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    change(values)
    path.write_text(json.dumps(values), encoding="utf-8")
    with suppress(ValidationError):  # of a manifest that not even its author could seal
        manifest = Manifest.model_validate(values)
        manifest.write_sealed(path)


LABEL = {"before": [1], "digits": [1] * 10, "after": [1]}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m["graphs"]["visual"].update(file="../visual.onnx"), "graphs.visual.file"),
        (lambda m: m["graphs"]["visual"].update(file="/etc/passwd"), "graphs.visual.file"),
        (lambda m: m["graphs"]["visual"].update(file="nosuch.onnx"), "lists no file 'nosuch.onnx'"),
        (lambda m: m["graphs"].pop("merger"), "visual, merger, language"),
        (lambda m: m["graphs"]["visual"].update(inputs=[]), "graphs.visual.inputs"),
        (
            lambda m: m["graphs"]["visual"]["profiles"]["default"].pop("position_ids"),
            "does not list the graph's inputs",
        ),
        (lambda m: m["graphs"]["visual"]["profiles"]["default"].update(position_ids=[[-1], [1], [1]]), "wrong shape"),
        (lambda m: m.update(hidden_size=10**9), "hidden_size"),
        (lambda m: m.update(hidden_size=512), "512"),
        (lambda m: m.update(vocab_size=10**6), "1000000 rows"),
        (lambda m: m["kv"].update(layers=0), "kv.layers"),
        (lambda m: m.update(surprise=1), "surprise"),
        (lambda m: m["generation"].pop("eos_token_ids"), "eos_token_ids"),
        (lambda m: m.update(format_version=1), "format version 1"),
        (lambda m: m.update(model_type="internvl"), "'internvl' manifest"),
        (lambda m: m["graphs"]["language"]["inputs"].pop(), "profile"),
        (lambda m: m["picture"].update(label={**LABEL, "after": [10**6]}), "pictures stand at token 1000000"),
        (lambda m: m["picture"].update(label={**LABEL, "digits": [1] * 9}), "picture.label.digits"),
        (lambda m: m["picture"].update(label={**LABEL, "before": [-1]}), "picture.label.before"),
        (lambda m: m["picture"].update(numbered=True, whole=True), "either numbers pictures or is one number"),
        (lambda m: m.update(graphs=5), "graphs"),
        (lambda m: m.update(graphs=[{}]), "graphs"),
    ],
)
def test_hostile_manifests(folder: Path, change: Callable[[dict[str, Any]], object], words: str) -> None:
    edit(folder, change)
    with pytest.raises(ArtifactError) as caught:
        VisionLanguageEngine.load(folder)
    assert words in caught.value.problem
    assert caught.value.remedy


@pytest.mark.parametrize("text", ["", "[]", "[" * 100_000, "null", '{"format_version": 1}'])
def test_manifests_that_are_none(folder: Path, text: str) -> None:
    (folder / "manifest.json").write_text(text, encoding="utf-8")
    with pytest.raises(ArtifactError):
        read_manifest(folder)


def test_a_link_out_of_the_folder(folder: Path, tmp_path: Path) -> None:
    (folder / "visual.onnx").rename(tmp_path / "elsewhere.onnx")
    (folder / "visual.onnx").symlink_to(tmp_path / "elsewhere.onnx")
    with pytest.raises(ArtifactError, match="points outside"):
        read_manifest(folder)


def test_weights_outside_the_folder(folder: Path, tmp_path: Path) -> None:
    """A graph must not make ONNX Runtime read files of the machine."""
    shutil.move(folder / "merger.onnx.data", tmp_path / "secret")
    model = onnx.load(folder / "merger.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../secret"
    (folder / "merger.onnx").write_bytes(model.SerializeToString())
    seal(folder)
    with pytest.raises(ArtifactError, match=r"lies in '\.\./secret', and only 'merger\.onnx\.data'"):
        VisionLanguageEngine.load(folder)


@pytest.mark.parametrize("file", ["visual.onnx", "language.onnx.data", EMBEDDING, "config.json", "manifest.json"])
def test_missing_files(folder: Path, file: str) -> None:
    (folder / file).unlink()
    with pytest.raises(ArtifactError):
        VisionLanguageEngine.load(folder)


@pytest.mark.parametrize("file", ["visual.onnx", "language.onnx.data", EMBEDDING, "config.json", "manifest.json"])
def test_truncated_files(folder: Path, file: str) -> None:
    path = folder / file
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ArtifactError):
        VisionLanguageEngine.load(folder)


def test_a_graph_with_other_inputs(folder: Path) -> None:
    for end in ("", ".data"):
        shutil.copyfile(folder / f"merger.onnx{end}", folder / f"visual.onnx{end}")
    graph = onnx.load(folder / "visual.onnx", load_external_data=False)
    for tensor in graph.graph.initializer:
        for place in tensor.external_data:
            place.value = place.value.replace("merger.", "visual.")
    (folder / "visual.onnx").write_bytes(graph.SerializeToString())
    seal(folder)
    with pytest.raises(ArtifactError, match=r"inputs of .*visual\.onnx"):
        VisionLanguageEngine.load(folder)


def test_what_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="not an ONNX or engine folder"):
        VisionLanguageEngine.load(tmp_path / "nosuch")


def test_engines_without_a_gpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qe_edge.runtime.cuda.LIBRARY", "libnosuch.so")
    graphs = {name: GraphBuild(size=1, seconds=1) for name in GRAPHS}
    digest = read_description(folder).digest
    EngineInfo(target="rtx", backend="tensorrt_rtx", version="1", graphs=graphs, manifest=digest).write(folder)
    with pytest.raises(TargetError, match="needs an NVIDIA GPU"):
        VisionLanguageEngine.load(folder)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not valid JSON"),
        ("{}", "engine.json is wrong"),
        ('{"target": "x", "backend": "tensorrt", "version": "1", "graphs": {}}', "of an earlier version"),
        ('{"digest": "", "target": "x", "backend": "os", "version": "1", "graphs": {}}', "backend"),
    ],
)
def test_damaged_engine_info(folder: Path, text: str, words: str) -> None:
    (folder / ENGINE_INFO).write_text(text, encoding="utf-8")
    with pytest.raises(ArtifactError, match=re.escape(words)):
        VisionLanguageEngine.load(folder)


def test_an_engine_info_that_is_no_file_does_not_pass_for_none(folder: Path) -> None:
    (folder / ENGINE_INFO).symlink_to("no-such-file")
    with pytest.raises(ArtifactError, match=r"The link '.*engine\.json' points at a missing file"):
        VisionLanguageEngine.load(folder)
    (folder / ENGINE_INFO).unlink()
    os.mkfifo(folder / ENGINE_INFO)  # which never ends when it is read
    with pytest.raises(ArtifactError, match=r"engine\.json' is not a file") as caught:
        VisionLanguageEngine.load(folder)
    assert caught.value.remedy == "Build it again."


def test_an_export_stores_the_embedding_as_the_checkpoint_does(exported: Exported) -> None:
    tensors = load_file(exported.checkpoint / "model.safetensors")
    (stored,) = (tensor for name, tensor in tensors.items() if name.endswith("embed_tokens.weight"))
    found = load_file(exported.onnx / EMBEDDING)["embedding"]
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, stored)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_embeddings_in_every_precision(tmp_path: Path, dtype: torch.dtype) -> None:
    table = torch.randn(20, 8).to(dtype)
    save_file({"embedding": table}, tmp_path / EMBEDDING)
    tokens = np.array([[0, 19], [7, 7]])
    found = TokenEmbedding(tmp_path, 20, 8)(tokens)
    assert found.dtype == np.float32
    assert (found == table.float().numpy()[tokens]).all()
    found += 1  # a copy: the file stays as it is
    assert (TokenEmbedding(tmp_path, 20, 8)(tokens) == table.float().numpy()[tokens]).all()
