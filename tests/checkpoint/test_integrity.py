from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest

from qe_edge.checkpoint.files import FILES, difference, origin_of, read_checkpoint_files
from qe_edge.checkpoint.integrity import Sealed, check_files, describe
from qe_edge.export.build import build_engines
from qe_edge.export.exporter import export_model
from qe_edge.models.quantized import load_quantized
from qe_edge.recipes.stored import load_checkpoint_recipe
from qe_edge.runtime.engine import VisionLanguageEngine
from qe_edge.runtime.manifest import read_description
from qe_edge.system.digests import CHUNK, file_digest
from qe_edge.system.errors import ArtifactError
from tests.conftest import Exported
from tests.sealing import seal

REMEDY = "Do it again."


@pytest.fixture
def checkpoint(exported: Exported, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported.checkpoint, tmp_path / "checkpoint"))


@pytest.fixture
def engines(exported: Exported, tmp_path: Path) -> Path:
    return build_engines(exported.onnx, tmp_path / "engines", "cpu")


def flip(path: Path) -> None:
    """One bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, 3 * CHUNK + 7])
def test_the_hash_is_sha256_whatever_the_size(tmp_path: Path, size: int) -> None:
    data = bytes(range(251)) * (size // 251 + 1)
    (tmp_path / "file").write_bytes(data[:size])
    assert file_digest(tmp_path / "file").sha256 == hashlib.sha256(data[:size]).hexdigest()


def test_a_folder_is_described_with_the_folders_in_it(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "tool use.jinja").write_text("x", encoding="utf-8")
    (tmp_path / "b").write_text("", encoding="utf-8")
    (tmp_path / "left out").touch()
    table = describe(tmp_path, lambda name: name != "left out")
    assert list(table) == ["b", "inner/tool use.jinja"]
    check_files(tmp_path, table, REMEDY)
    (tmp_path / "inner" / "tool use.jinja").write_text("y", encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"tool use\.jinja' is damaged: its SHA-256") as caught:
        check_files(tmp_path, table, REMEDY)
    assert caught.value.remedy == REMEDY


def test_what_was_not_listed_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="lacks 'recipe"):
        check_files(tmp_path, {}, REMEDY, ["recipe.json"])


def test_every_file_of_a_checkpoint_is_compared(checkpoint: Path) -> None:
    load_quantized(checkpoint)
    names = sorted(path.name for path in checkpoint.iterdir())
    assert {"model.safetensors", "recipe.json", "tokenizer.json", FILES} <= set(names)
    for name in names:
        path, kept = checkpoint / name, (checkpoint / name).read_bytes()
        flip(path)
        with pytest.raises(ArtifactError, match=name.replace(".", r"\.")):
            load_quantized(checkpoint)
        path.write_bytes(kept)
    flip(checkpoint / "recipe.json")
    with pytest.raises(ArtifactError, match=r"recipe\.json' is damaged: its SHA-256") as caught:
        load_checkpoint_recipe(checkpoint)
    assert "quantize the model again" in caught.value.remedy


def test_every_file_of_an_engine_folder_is_compared(engines: Path) -> None:
    VisionLanguageEngine.load(engines)
    for path in sorted(engines.iterdir()):
        kept = path.read_bytes()
        flip(path)
        with pytest.raises(ArtifactError, match=path.name.replace(".", r"\.")):
            VisionLanguageEngine.load(engines)
        path.write_bytes(kept)


def test_what_is_cut_off_is_found_by_its_size(checkpoint: Path, engines: Path) -> None:
    for folder, name in ((checkpoint, "model.safetensors"), (engines, "language.onnx.data")):
        (folder / name).write_bytes((folder / name).read_bytes()[:-1])
    with pytest.raises(ArtifactError, match=r"model\.safetensors' is damaged: it has \d+ bytes and was written with"):
        load_quantized(checkpoint)
    with pytest.raises(ArtifactError, match=r"language\.onnx\.data' is damaged: it has \d+ bytes"):
        read_description(engines)


@pytest.mark.parametrize("name", ["added_tokens.json", "chat_template.json", "more.safetensors"])
def test_configuration_that_was_added(checkpoint: Path, name: str) -> None:
    (checkpoint / "notes.md").write_text("mine", encoding="utf-8")  # nobody reads it
    load_checkpoint_recipe(checkpoint)
    load_quantized(checkpoint)
    (checkpoint / name).write_text("{}", encoding="utf-8")
    with pytest.raises(ArtifactError, match=re.escape(f"{name}' was added after")) as caught:
        load_quantized(checkpoint)
    assert caught.value.remedy.startswith("Remove it")


def test_configuration_that_is_a_link_to_another_place(checkpoint: Path, engines: Path, tmp_path: Path) -> None:
    for folder, load in ((checkpoint, load_quantized), (engines, VisionLanguageEngine.load)):
        for name in ("tokenizer.json", "chat_template.jinja"):
            shutil.move(folder / name, tmp_path / name)
            (folder / name).symlink_to(tmp_path / name)
            with pytest.raises(ArtifactError, match=re.escape(f"{name}' is a link that points outside")) as caught:
                load(folder)
            assert "Put the file itself" in caught.value.remedy
            (folder / name).unlink()
            shutil.move(tmp_path / name, folder / name)


def test_a_tokenizer_that_names_files_of_other_folders(checkpoint: Path, engines: Path) -> None:
    """Its author can write hashes; transformers would read the other file."""
    for folder, load in ((checkpoint, load_quantized), (engines, VisionLanguageEngine.load)):
        path = folder / "tokenizer_config.json"
        values = json.loads(path.read_text(encoding="utf-8"))
        values["fast_tokenizer_files"] = ["../elsewhere/tokenizer.4.0.0.json"]
        path.write_text(json.dumps(values), encoding="utf-8")
        seal(folder)
        with pytest.raises(ArtifactError, match="fast_tokenizer_files"):
            load(folder)


@pytest.mark.parametrize("name", ["/etc/hostname", "../model.safetensors", "a/../../b", "", "a\\b", ".hidden"])
def test_a_list_of_files_names_plain_files(checkpoint: Path, name: str) -> None:
    values = json.loads((checkpoint / FILES).read_text(encoding="utf-8"))
    values["files"][name] = values["files"]["config.json"]
    (checkpoint / FILES).write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(ArtifactError, match="no plain file name"):
        load_quantized(checkpoint)


def test_checkpoints_of_before(checkpoint: Path) -> None:
    (checkpoint / FILES).unlink()
    with pytest.raises(ArtifactError, match=r"has no 'files\.json': an earlier version wrote it") as caught:
        load_quantized(checkpoint)
    assert caught.value.remedy.startswith("Quantize the model again")


def test_engines_of_before(engines: Path) -> None:
    values = json.loads((engines / "engine.json").read_text(encoding="utf-8"))
    del values["digest"], values["manifest"]
    (engines / "engine.json").write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(ArtifactError, match="of an earlier version") as caught:
        VisionLanguageEngine.load(engines)
    assert caught.value.remedy == "Export and build again."


def test_descriptions_of_two_builds_do_not_mix(exports: object, engines: Path, exported: Exported) -> None:
    folder = engines.with_name("other")
    shutil.copytree(exported.onnx, folder)
    shutil.copyfile(engines / "engine.json", folder / "engine.json")
    with pytest.raises(ArtifactError, match=r"engine\.json' describes other engines"):
        VisionLanguageEngine.load(folder)
    (engines / "engine.json").unlink()
    with pytest.raises(ArtifactError, match=r"'engine\.json' is missing"):
        VisionLanguageEngine.load(engines)


def test_the_same_inputs_give_the_same_descriptions(exported: Exported, tmp_path: Path) -> None:
    export_model(exported.checkpoint, tmp_path / "again")
    again = tmp_path / "again" / "manifest.json"
    assert again.read_bytes() == (exported.onnx / "manifest.json").read_bytes()
    built = [build_engines(folder, tmp_path / folder.name, "cpu") for folder in (exported.onnx, tmp_path / "again")]
    manifests = {(folder / "manifest.json").read_bytes() for folder in built}
    assert len(manifests) == 1
    description = read_description(built[0])
    assert description.onnx == read_description(exported.onnx).digest
    assert description.checkpoint == read_checkpoint_files(exported.checkpoint).digest


def test_an_origin_is_weights_and_configuration(tmp_path: Path) -> None:
    for name in ("a.safetensors", "b.safetensors", "config.json", "tokenizer.json", "README.md", "picture.png"):
        (tmp_path / name).write_text(name, encoding="utf-8")
    origin = origin_of(str(tmp_path), None)
    assert origin is not None
    assert sorted(origin.files) == ["a.safetensors", "b.safetensors", "config.json", "tokenizer.json"]
    (tmp_path / "README.md").write_text("new", encoding="utf-8")
    assert difference(origin, tmp_path) is None
    (tmp_path / "b.safetensors").write_text("B.safetensors", encoding="utf-8")
    assert difference(origin, tmp_path) == "b.safetensors"
    (tmp_path / "b.safetensors").write_text("b.safetensors", encoding="utf-8")
    (tmp_path / "merges.txt").touch()
    assert difference(origin, tmp_path) == "merges.txt"
    assert origin_of("owner/name", "1" * 40).revision == "1" * 40  # type: ignore[union-attr]
    assert origin_of("made in Python", None) is None


class Earlier(Sealed):
    """A description."""

    name: str


class Later(Earlier):
    """The same with a field that a later version added."""

    color: str = "red"


def test_a_description_of_an_earlier_version_is_not_called_changed(tmp_path: Path) -> None:
    path = tmp_path / "description.json"
    Earlier(name="a").write_sealed(path)
    values = json.loads(path.read_text())
    Later.model_validate(values).check_seal(values, path, "Write it again.")
    values["name"] = "b"
    with pytest.raises(ArtifactError, match="was changed after it was written"):
        Later.model_validate(values).check_seal(values, path, "Write it again.")
