"""Embeddings and heads that stay in their files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from qe_edge.models import tables
from qe_edge.models.loading import load_model, load_outside_blocks
from qe_edge.models.rotation import rotate_language_model
from qe_edge.models.stored import Source, StoredWeights
from qe_edge.models.tables import embeddings_of, head_in_parts, read_by_rows, tables_of
from tests.small_models import write_small_dinov2, write_small_llama

IDS = torch.tensor([[5, 6, 5], [0, 511, 7]])


class ScaledEmbedding(nn.Embedding):
    """Scales its rows, as Gemma's do."""

    def forward(self, input_ids: Tensor) -> Tensor:
        return super().forward(input_ids) * 12.5


class OneTable(nn.Module):
    """A model with an embedding and another one of the same rows."""

    def __init__(self) -> None:
        super().__init__()
        self.own = ScaledEmbedding(40, 8, padding_idx=39)
        self.per_layer = nn.Embedding(40, 24)
        self.positions = nn.Embedding(7, 8)

    def get_input_embeddings(self) -> nn.Module:
        return self.own


@pytest.mark.parametrize("tied", [True, False])
def test_embedding_and_head_are_not_read(tied: bool, tmp_path: Path) -> None:
    folder = str(write_small_llama(tmp_path, tie_word_embeddings=tied))
    loaded, whole = load_outside_blocks(folder), load_model(folder)
    for name, module in tables_of(loaded.model).items():
        assert loaded.stored.is_absent(module.get_parameter("weight")), name
    embedding = loaded.model.get_input_embeddings()
    with read_by_rows(loaded.model, loaded.stored):
        found = embedding(IDS)
    assert torch.equal(found, whole.model.get_input_embeddings()(IDS).float())
    assert loaded.stored.is_absent(embedding.get_parameter("weight"))  # afterwards too
    loaded.stored.read("", loaded.model)
    wanted = whole.model.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in loaded.model.state_dict().items())
    shared = loaded.model.get_output_embeddings().weight.data_ptr() == embedding.get_parameter("weight").data_ptr()
    assert shared is tied


@pytest.mark.parametrize("tied", [True, False])
def test_rows_are_rotated_as_they_are_read(tied: bool, tmp_path: Path) -> None:
    folder = str(write_small_llama(tmp_path, tie_word_embeddings=tied))
    loaded, whole = load_outside_blocks(folder), load_model(folder)
    for one in (loaded, whole):
        rotate_language_model(one, seed=3)
    with read_by_rows(loaded.model, loaded.stored):
        found = loaded.model.get_input_embeddings()(IDS)
    assert torch.equal(found, whole.model.get_input_embeddings()(IDS).float())
    loaded.stored.read("", loaded.model)
    assert torch.equal(loaded.model.get_output_embeddings().weight, whole.model.get_output_embeddings().weight)


@pytest.mark.parametrize("on_disk", [True, False])
def test_an_embeddings_own_forward_gets_the_rows(on_disk: bool, tmp_path: Path) -> None:
    model, ids = OneTable().bfloat16(), torch.tensor([[3, 39, 3, 0]])
    assert list(embeddings_of(model)) == ["own", "per_layer"]
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(tensors, tmp_path / "model.safetensors")
    stored = StoredWeights({name: Source(tmp_path / "model.safetensors", name) for name in tensors})
    if on_disk:
        stored.release("own", model.own)
        stored.release("per_layer", model.per_layer)
    with read_by_rows(model, stored):
        found, other = model.own(ids), model.per_layer(ids)
    assert torch.equal(found, tensors["own.weight"][ids].float() * 12.5)
    assert torch.equal(other, tensors["per_layer.weight"][ids].float())
    assert model.own.padding_idx == 39
    assert model.own.weight.shape == (40, 8)


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_in_parts_has_the_gradient_of_a_whole_one(
    tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "ROWS", 100)  # of 512: the last part is shorter
    folder = str(write_small_llama(tmp_path, tie_word_embeddings=tied))
    loaded, whole = load_outside_blocks(folder), load_model(folder, torch.float32)
    torch.manual_seed(0)
    given = torch.randn(2, 3, 64)
    hidden, other = (given.clone().requires_grad_() for _ in range(2))
    with head_in_parts(loaded.model, loaded.stored):
        logits = loaded.model.get_output_embeddings()(hidden)
        logits.square().sum().backward()
    wanted = whole.model.get_output_embeddings()(other)
    wanted.square().sum().backward()
    assert logits.dtype == torch.float32
    assert torch.allclose(logits, wanted, atol=1e-5)
    assert hidden.grad is not None
    assert other.grad is not None
    assert torch.allclose(hidden.grad, other.grad, rtol=1e-4, atol=1e-3)
    assert loaded.stored.is_absent(loaded.model.get_output_embeddings().weight)


def test_a_vision_encoder_has_no_tables(tmp_path: Path) -> None:
    assert tables_of(load_outside_blocks(str(write_small_dinov2(tmp_path))).model) == {}
