"""Where a model is read tensor by tensor, none is held beside the next: an embedding and a head are gigabytes each."""

from __future__ import annotations

import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qe_edge.checkpoint.safetensors_write import write_tensors
from qe_edge.models.loading import load_model
from qe_edge.models.stored import StoredWeights
from qe_edge.numerics.grids import WeightGrid
from qe_edge.quantization.preflight import check_weights


class Watched:
    """Makes tensors of zeros, and looks whether the memory of the earlier ones is free."""

    def __init__(self) -> None:
        self.made: list[weakref.ref[np.ndarray]] = []

    def value(self, _name: str, tensor: Tensor) -> Tensor:
        assert [reference for reference in self.made if reference() is not None] == []
        memory = np.zeros(max(tensor.nbytes, 1), np.uint8)
        self.made.append(weakref.ref(memory))
        return torch.from_numpy(memory)[: tensor.nbytes].view(tensor.dtype).reshape(tensor.shape)


def test_writing(tmp_path: Path) -> None:
    watched = Watched()
    sizes = {name: torch.empty(3, 4, device="meta") for name in ("embedding", "head", "norm")}
    write_tensors(sizes, tmp_path / "model.safetensors", watched.value)
    assert len(watched.made) == 3
    assert all(torch.equal(tensor, torch.zeros(3, 4)) for tensor in load_file(tmp_path / "model.safetensors").values())


def test_looking_for_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, watched = load_model("demo"), Watched()
    monkeypatch.setattr(StoredWeights, "value", lambda _self, name, tensor: watched.value(name, tensor))
    check_weights(loaded, loaded.family.blocks(loaded.model), WeightGrid(4))
    assert len(watched.made) == len(loaded.model.state_dict())


def test_a_file_written_tensor_by_tensor_is_the_librarys(tmp_path: Path) -> None:
    tensors = {
        "scalar": torch.tensor(1.5),
        "Ä": torch.arange(6).reshape(2, 3),
        "b": torch.randn(3, 5).bfloat16(),
        "a": torch.randn(4).half(),
        "c": torch.randn(4, 3).T,
        "d": torch.ones(3, dtype=torch.bool),
        "e": torch.zeros(0, 4, dtype=torch.uint8),
        "f": torch.zeros(5, dtype=torch.int8),
        "g": torch.zeros(5, dtype=torch.float64),
        "h": torch.zeros(5, dtype=torch.int32),
        "i": torch.zeros(5, dtype=torch.int16),
    }
    write_tensors(tensors, tmp_path / "ours", lambda _, tensor: tensor, {"format": "pt"})
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "theirs", {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
