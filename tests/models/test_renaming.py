"""Models under another name: the nearest family is named, and a model with exactly its tensors becomes one of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING

from qe_edge.cli import main
from qe_edge.demo import model_path
from qe_edge.models.family import Sample
from qe_edge.models.loading import load_model
from qe_edge.models.nearest import nearest_family
from qe_edge.models.renaming import rename_model
from qe_edge.system.errors import ModelError, UnknownNameError
from tests.models.conversations import torch_logits
from tests.models.model_files import edit
from tests.small_models import write_small_llama

NAME = "lama_with_a_hat"


def renamed(values: dict[str, Any]) -> None:
    values.update(model_type=NAME, auto_map={"AutoModel": "modeling.Lama"}, architectures=["Lama"])


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = write_small_llama(tmp_path / "model")
    edit(folder / "config.json", renamed)
    (folder / "modeling.py").write_text("raise RuntimeError('of a stranger')\n", encoding="utf-8")
    return folder


def test_a_model_under_another_name_is_converted_and_computes_the_same(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nearest family is 'llama', whose configuration has all") as caught:
        load_model(str(model))
    assert f"qe-edge convert {model} --as FAMILY" in caught.value.remedy
    assert main(["convert", str(model), "--as", "llama", "-o", str(tmp_path / "converted")]) == 0
    assert not (tmp_path / "converted" / "modeling.py").exists()
    samples = [Sample(None, "is it red?", "no")]
    found = torch_logits(load_model(str(tmp_path / "converted"), torch.float32), samples)
    wanted = torch_logits(load_model(str(write_small_llama(tmp_path / "original")), torch.float32), samples)
    assert (found == wanted).all()


def test_a_model_of_another_architecture_is_not_converted(model: Path, tmp_path: Path) -> None:
    for family, problem in (("gemma3", "tokens per side"), ("qwen3", "k_norm")):
        with pytest.raises(ModelError, match=f"model' is no '{family}' model: .*{problem}") as caught:
            rename_model(model, family, tmp_path / "converted")
        assert ".part" not in str(caught.value)
    with pytest.raises(UnknownNameError, match="lamma"):
        rename_model(model, "lamma", tmp_path / "converted")
    with pytest.raises(ModelError, match="no folder with a config"):
        rename_model(tmp_path / "nothing", "llama", tmp_path / "converted")
    assert not (tmp_path / "converted").exists()


def test_sections_get_the_familys_own_names() -> None:
    values = json.loads((model_path() / "config.json").read_text(encoding="utf-8"))
    values["model_type"] = values["text_config"]["model_type"] = "another_vl"
    assert nearest_family(values) == ("qwen2_vl", [])


@pytest.mark.parametrize(
    ("model_type", "family", "key"),
    [
        ("qwen3_5_moe", "qwen3_5", "text_config.num_experts"),
        ("minicpmv4_7", "minicpmv4_6", "slice_start_id"),
        ("smollm3", "qwen3", "no_rope_layers"),
        ("llava", "llava_onevision", "image_seq_length"),
    ],
)
def test_what_does_not_fit_is_named(model_type: str, family: str, key: str) -> None:
    nearest, unknown = nearest_family(CONFIG_MAPPING[model_type]().to_dict())
    assert nearest == family
    assert key in unknown
