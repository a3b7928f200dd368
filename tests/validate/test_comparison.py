"""Layer errors, logits and routing against direct computations on unpadded samples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qe_edge.layers.linear import quantized_linears
from qe_edge.models.family import Encoded, Sample
from qe_edge.models.loading import LoadedModel
from qe_edge.validate.comparison import Comparison, predicting_positions
from qe_edge.validate.metrics import kl_divergence
from qe_edge.validate.subjects import TorchSubject

LANGUAGE = "model.language_model.layers.1.mlp.down_proj"
VISUAL = "model.visual.blocks.0.mlp.fc1"


def inputs_of(loaded: LoadedModel, name: str, sample: Sample) -> tuple[Tensor, Tensor, np.ndarray]:
    """Input and output of one linear layer on one sample alone, flat, and its image mask."""
    caught: list[tuple[Tensor, Tensor]] = []

    def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        caught.append((inputs[0].flatten(0, -2), output.flatten(0, -2)))

    handle = loaded.model.get_submodule(name).register_forward_hook(hook)
    encoded = loaded.family.encode(loaded.processor, [sample], answers=True)
    with torch.no_grad():
        loaded.model(**loaded.family.torch_inputs(encoded))
    handle.remove()
    return *caught[0], encoded.image_mask[0]


def relative(pairs: list[tuple[Tensor, Tensor]]) -> float:
    wanted, found = (torch.cat(side).double() for side in zip(*pairs, strict=True))
    return float((wanted - found).norm() / wanted.norm())


def test_layer_errors_equal_a_direct_computation(
    original: LoadedModel, quantized: LoadedModel, questions: list[Sample]
) -> None:
    comparison = Comparison(original, quantized, None)
    comparison.measure_heldout(questions, lambda _: None)
    comparison.measure_calibration(questions[:2], lambda _: None)
    errors = {layer.name: layer for layer in comparison.layer_errors()}
    layers = quantized_linears(quantized.model)
    assert list(errors) == list(layers)
    vision, text, patches = [], [], []
    for sample in questions:
        x, y, image = inputs_of(original, LANGUAGE, sample)
        found = layers[LANGUAGE](x)
        vision.append((y[image], found[image]))
        text.append((y[~image], found[~image]))
        x, y, _ = inputs_of(original, VISUAL, sample)
        patches.append((y, layers[VISUAL](x)))
    found = errors[LANGUAGE].heldout
    assert found.vision == pytest.approx(relative(vision), rel=1e-3)
    assert found.text == pytest.approx(relative(text), rel=1e-3)
    assert found.all == pytest.approx(relative(vision + text), rel=1e-3)
    assert found.tokens == sum(len(y) for y, _ in vision + text)
    assert errors[VISUAL].heldout.vision == pytest.approx(relative(patches), rel=1e-3)
    assert errors[VISUAL].heldout.text is None
    calibration = errors[LANGUAGE].calibration
    assert calibration is not None
    assert calibration.all == pytest.approx(relative(vision[:2] + text[:2]), rel=1e-3)


def test_routing_load_counts_every_token_once(
    original: LoadedModel, quantized: LoadedModel, questions: list[Sample]
) -> None:
    comparison = Comparison(original, quantized, None)
    comparison.measure_heldout(questions, lambda _: None)
    loads = {load.layers[0]: load for load in comparison.routing_loads()}
    down = quantized_linears(quantized.model)[LANGUAGE]
    counts = {True: torch.zeros(down.num_experts), False: torch.zeros(down.num_experts)}
    for sample in questions:
        x, _, image = inputs_of(original, LANGUAGE, sample)
        expert = down.expert_index(x)
        assert expert is not None
        for kind in counts:
            counts[kind] += torch.bincount(expert[torch.from_numpy(image) == kind], minlength=down.num_experts)
    load = loads[LANGUAGE]
    # routing is discontinuous: a token on the fence may go either way in a padded batch
    assert load.vision == pytest.approx((counts[True] / counts[True].sum()).tolist(), abs=0.02)
    assert load.text == pytest.approx((counts[False] / counts[False].sum()).tolist(), abs=0.02)
    assert sum(load.all) == pytest.approx(1)


def test_siblings_that_share_a_router_are_one_row(
    original: LoadedModel, quantized: LoadedModel, questions: list[Sample]
) -> None:
    comparison = Comparison(original, quantized, None)
    comparison.measure_heldout(questions[:1], lambda _: None)
    names = [[name.rpartition(".")[2] for name in load.layers] for load in comparison.routing_loads()]
    assert ["q_proj", "k_proj", "v_proj"] in names
    assert ["gate_proj", "up_proj"] in names


class Louder:
    """A subject whose logits are off by one in a thousand."""

    def __init__(self, loaded: LoadedModel) -> None:
        self._subject = TorchSubject(loaded)

    def logits(self, encoded: Encoded) -> np.ndarray:
        return self._subject.logits(encoded) * np.float32(1.001)

    def generate_ids(self, encoded: Encoded, max_new_tokens: int) -> Sequence[Sequence[int]]:
        return self._subject.generate_ids(encoded, max_new_tokens)


def test_distances_equal_a_direct_computation(
    original: LoadedModel, quantized: LoadedModel, questions: list[Sample]
) -> None:
    comparison = Comparison(original, quantized, Louder(quantized))
    comparison.measure_heldout(questions, lambda _: None)
    answer, text = [], []
    for sample in questions:
        encoded = original.family.encode(original.processor, [sample], answers=True)
        wanted, found = (torch.from_numpy(TorchSubject(model).logits(encoded)) for model in (original, quantized))
        divergence = kl_divergence(wanted[0, :-1], found[0, :-1])
        for position in range(len(divergence)):
            if encoded.answer_mask[0, position + 1]:
                answer.append(divergence[position])
            if not encoded.image_mask[0, position + 1]:
                text.append(divergence[position])
    measured = comparison.distances["quantized"]
    assert measured.answer.positions == len(answer)
    assert measured.text.positions == len(text)
    assert measured.answer.mean_divergence() == pytest.approx(torch.stack(answer).mean().item(), rel=0.02)
    assert measured.text.mean_divergence() == pytest.approx(torch.stack(text).mean().item(), rel=0.02)
    assert comparison.engine_error.value() == pytest.approx(1e-3, rel=1e-2)


def test_a_model_equals_itself(original: LoadedModel, questions: list[Sample]) -> None:
    comparison = Comparison(original, original, None)
    comparison.measure_heldout(questions[:3], lambda _: None)
    measured = comparison.distances["quantized"]
    assert measured.text.mean_divergence() == pytest.approx(0, abs=1e-12)
    assert measured.text.agreement() == 1
    assert [error.heldout.all for error in comparison.stream_errors()] == [0.0] * 4


def test_positions_leave_out_padding_and_the_first_token() -> None:
    encoded = Encoded(
        input_ids=np.zeros((2, 5), np.int64),
        attention_mask=np.array([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]),
        image_mask=np.array([[0, 1, 1, 0, 0], [0, 0, 0, 0, 0]], bool),
        answer_mask=np.array([[0, 0, 0, 0, 1], [0, 0, 0, 1, 1]], bool),
    )
    masks = predicting_positions(encoded)
    assert masks["text"].tolist() == [[False, False, True, True], [False, False, True, True]]
    assert masks["answer"].tolist() == [[False, False, False, True], [False, False, True, True]]
