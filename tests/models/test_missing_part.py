"""A model that was saved without one of its parts."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from qe_edge.models.loading import load_model, load_outside_blocks
from qe_edge.system.errors import ModelError
from tests.small_vlm import write_small_vlm


def _without(folder: Path, words: str) -> Path:
    path = write_small_vlm(folder) / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(path).items() if words not in name}
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("load", [load_model, load_outside_blocks])
def test_a_text_only_fine_tune_is_named(tmp_path: Path, load: object) -> None:
    folder = _without(tmp_path / "model", "visual.")
    with pytest.raises(ModelError, match=r"hold nothing of the model's 'model\.visual'") as caught:
        load(str(folder))  # type: ignore[operator]
    assert "Add the tensors of 'model.visual'" in caught.value.remedy


def test_a_part_that_lacks_a_block_is_told_as_before(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"lack \d+ of the model's tensors, among them 'model\.visual"):
        load_model(str(_without(tmp_path / "model", "visual.blocks.0.")))
