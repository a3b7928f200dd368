"""External data in several files, as models of more than 4 GB have it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

from qe_edge.export import saving
from qe_edge.export.build import build_engines
from qe_edge.export.exporter import export_model
from qe_edge.models.family import Sample
from qe_edge.models.loading import load_model
from qe_edge.runtime.engine import VisionLanguageEngine
from qe_edge.runtime.graph_files import check_graph_file
from qe_edge.runtime.manifest import read_manifest
from qe_edge.system.errors import ArtifactError
from tests.small_models import write_small_llama

SHARD = 50_000  # bytes; the small model has 250,000


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    export_model(load_model(str(write_small_llama(folder / "model"))), folder / "onnx")
    return folder / "onnx"


@pytest.fixture(scope="module")
def sharded(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving, "SHARD_BYTES", SHARD)
        export_model(load_model(str(whole.parent / "model")), folder / "onnx")
        build_engines(folder / "onnx", folder / "cpu", "cpu")
    return folder


def shards(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.data"))


def logits(folder: Path) -> np.ndarray:
    engine = VisionLanguageEngine.load(folder, threads=1)
    return engine.logits(engine.encode([Sample(None, "is it red?", "no")], answers=True))


def test_shards_are_one_model(whole: Path, sharded: Path) -> None:
    assert shards(whole) == ["language.onnx.data"]
    for folder in (sharded / "onnx", sharded / "cpu"):
        found = shards(folder)
        assert len(found) > 2
        assert found == [f"language-{number + 1:05d}-of-{len(found):05d}.onnx.data" for number in range(len(found))]
        assert set(found) <= set(read_manifest(folder).files)
    assert np.array_equal(logits(sharded / "onnx"), logits(whole))
    assert np.abs(logits(sharded / "cpu") - logits(whole)).max() < 1e-5


def test_an_engine_is_built_of_shards(sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "SHARD_BYTES", SHARD)
    build_engines(sharded / "onnx", tmp_path / "rtx", "rtx")
    assert (tmp_path / "rtx" / "language.engine").is_file()
    assert not shards(tmp_path / "rtx")


@pytest.fixture
def copied(sharded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sharded / "onnx", tmp_path / "onnx"))


def test_a_shard_that_is_missing_or_short(copied: Path) -> None:
    shard = copied / shards(copied)[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match=f"goes beyond the end of '{shard.name}'"):
        check_graph_file(copied, "language.onnx")
    shard.unlink()
    with pytest.raises(ArtifactError, match=f"lies in '{shard.name}', which is missing"):
        check_graph_file(copied, "language.onnx")


@pytest.mark.parametrize(
    "name", ["language-1-of-2.onnx.data", "language-00001-of-00002.onnx.data\n", "visual-00001-of-00002.onnx.data"]
)
def test_data_in_files_of_other_names(copied: Path, name: str) -> None:
    (copied / name).write_bytes((copied / shards(copied)[0]).read_bytes())
    place(copied, location=name)
    with pytest.raises(ArtifactError, match=r"and only 'language\.onnx\.data' in the same folder is read"):
        check_graph_file(copied, "language.onnx")


def test_tensors_that_overlap_in_a_shard(copied: Path) -> None:
    """Equal offsets in two files are no overlap; in one file they are."""
    check_graph_file(copied, "language.onnx")
    place(copied, location=shards(copied)[1])
    with pytest.raises(ArtifactError, match=f"overlap in '{shards(copied)[1]}' at byte 0"):
        check_graph_file(copied, "language.onnx")


def place(folder: Path, *, location: str) -> None:
    """Let a tensor of the first shard lie elsewhere."""
    path = folder / "language.onnx"
    model = onnx.load(path, load_external_data=False)
    first = shards(folder)[0]
    entry = next(
        entry
        for tensor in model.graph.initializer
        for entry in tensor.external_data
        if (entry.key, entry.value) == ("location", first) and offset(tensor) == 0
    )
    entry.value = location
    onnx.save(model, path)


def offset(tensor: onnx.TensorProto) -> int:
    return next((int(entry.value) for entry in tensor.external_data if entry.key == "offset"), 0)
