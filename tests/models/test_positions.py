"""Positions of prompt and answer tokens are those that transformers computes itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qe_edge.models.family import Sample
from qe_edge.models.loading import LoadedModel, load_model


@pytest.fixture(scope="module")
def demo() -> LoadedModel:
    return load_model("demo", torch.float32)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (1,), (2, 0)])
def test_qwen2_vl_positions_are_those_of_transformers(
    demo: LoadedModel, samples: list[Sample], order: tuple[int, ...]
) -> None:
    encoded = demo.family.encode(demo.processor, [samples[index] for index in order])
    positions = demo.family.position_ids(encoded)
    inputs = demo.family.torch_inputs(encoded)
    expected, deltas = demo.model.model.get_rope_index(  # type: ignore[union-attr,operator]
        input_ids=inputs["input_ids"],
        mm_token_type_ids=inputs["mm_token_type_ids"],
        image_grid_thw=inputs["image_grid_thw"],
        attention_mask=inputs["attention_mask"],
    )
    valid = encoded.attention_mask.astype(bool)
    assert np.array_equal(positions[:, valid], expected.numpy()[:, valid])
    for step in (0, 1, 7):
        following = valid.sum(1, keepdims=True) + deltas.numpy() + step
        assert np.array_equal(demo.family.next_position_ids(positions, step), np.stack([following] * 3))


def test_positions_of_a_wide_picture_span_its_grid(demo: LoadedModel, samples: list[Sample]) -> None:
    encoded = demo.family.encode(demo.processor, [samples[1]])
    _, rows, columns = encoded.pixels["image_grid_thw"][0] // (1, 2, 2)
    assert columns > rows  # a wide picture
    grid = demo.family.position_ids(encoded)[:, encoded.image_mask]
    start = int(encoded.image_mask[0].argmax())
    assert np.array_equal(np.ptp(grid, axis=1), [0, rows - 1, columns - 1])
    assert grid.min() == start
    after = demo.family.position_ids(encoded)[:, 0, start + rows * columns]
    assert np.array_equal(after, np.full(3, start + columns))


def test_internvl_positions_count_valid_tokens(loaded: LoadedModel, samples: list[Sample]) -> None:
    if loaded.family.model_type != "internvl":
        pytest.skip("plain positions")
    encoded = loaded.family.encode(loaded.processor, samples)
    positions = loaded.family.position_ids(encoded)
    for row, mask in zip(positions, encoded.attention_mask.astype(bool), strict=True):
        assert np.array_equal(row[mask], np.arange(mask.sum()))
        assert not row[~mask].any()
    following = loaded.family.next_position_ids(positions, 2)
    assert np.array_equal(following[:, 0], encoded.attention_mask.sum(1) + 2)


def test_generation_continues_with_the_same_positions(loaded: LoadedModel, samples: list[Sample]) -> None:
    """Two tokens by generate equal the argmax of one pass over prompt and first token."""
    encoded = loaded.family.encode(loaded.processor, samples)
    inputs = loaded.family.torch_inputs(encoded)
    options = {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False}
    tokens = loaded.model.generate(**inputs, **options)  # type: ignore[operator]
    grown = {**inputs, "input_ids": tokens[:, :-1]}
    one = torch.ones(len(tokens), 1, dtype=torch.int64)
    grown["attention_mask"] = torch.cat((inputs["attention_mask"], one), 1)
    if "mm_token_type_ids" in grown:
        grown["mm_token_type_ids"] = torch.cat((inputs["mm_token_type_ids"], 0 * one), 1)
    positions = loaded.family.position_ids(encoded)
    following = loaded.family.next_position_ids(positions, 0)
    grown["position_ids"] = torch.from_numpy(np.concatenate((positions, following), axis=-1))
    with torch.no_grad():
        logits = loaded.model(**grown).logits[:, -1]
    ends = loaded.model.generation_config.eos_token_id  # type: ignore[union-attr]
    logits[:, ends] = -torch.inf  # min_new_tokens forbids the end
    assert torch.equal(logits.argmax(-1), tokens[:, -1])
