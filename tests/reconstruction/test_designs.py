from __future__ import annotations

import numpy as np
import pytest
import torch

from qe_edge.calibration.statistics import StatisticsRequest, collect_statistics
from qe_edge.reconstruction.designs import ErrorSpectrum, RoutedDesign, routed_losses
from qe_edge.reconstruction.gptq import Hessian
from qe_edge.reconstruction.packed_factors import pack_correction, packing_loss
from tests.layers import correlated_layer

CHANNELS, TYPES, OWN = 64, 8, 8
DESIGN = RoutedDesign(shared=8, routed=8, experts=4)


def tokens_of(types: np.ndarray, drawn: np.random.Generator) -> np.ndarray:
    """Tokens whose own channels are large: those of type i are `OWN` channels from `i * OWN` on."""
    tokens = 0.1 * drawn.standard_normal((len(types), CHANNELS))
    for row, kind in enumerate(types):
        tokens[row, kind * OWN : (kind + 1) * OWN] += 4 * drawn.standard_normal(OWN)
    return tokens


def gain(types: np.ndarray) -> float:
    """Routed loss relative to the static one of the active rank."""
    drawn = np.random.default_rng(0)
    x, error = tokens_of(types, drawn), drawn.standard_normal((96, CHANNELS))
    request = StatisticsRequest(gram=True, tokens=len(x), important=OWN)
    weight = torch.ones(96, CHANNELS)
    statistics = collect_statistics("layer", weight, torch.from_numpy(x).float(), request, 0)
    assert statistics.gram is not None
    spectrum = ErrorSpectrum.of(error, statistics.gram, 32)
    (loss,) = routed_losses(spectrum, statistics, np.ones(CHANNELS), OWN, [DESIGN], seed=0)
    return loss / spectrum.left(DESIGN.shared + DESIGN.routed)


def test_routing_wins_a_trial_only_on_tokens_of_samples_that_it_has_not_seen() -> None:
    drawn = np.random.default_rng(1)
    everywhere = drawn.integers(0, TYPES // 2, 1600)
    assert gain(everywhere) < 0.7
    # the samples of the second half hold other types of tokens than those of the first
    moved = np.concatenate((drawn.integers(0, TYPES // 2, 800), drawn.integers(TYPES // 2, TYPES, 800)))
    assert gain(moved) > 1.0


@pytest.mark.parametrize("shape", [(40, 64), (80, 48)])
def test_a_packing_loss_is_the_energy_that_int4_factors_leave_beyond_real_ones(shape: tuple[int, int]) -> None:
    weight, x = correlated_layer(*shape, 500)
    error, gram = weight.double().numpy(), (x.double().T @ x.double() / len(x)).numpy()
    spectrum = ErrorSpectrum.of(error, gram, 16)
    packed = pack_correction([spectrum.space.lift(spectrum.vectors)], error, Hessian(gram), [None])
    left = error - packed.ups[0] @ packed.downs[0]
    lost = float(np.einsum("ij,ij->", left @ gram, left)) - spectrum.left(16)
    found = packing_loss(error, Hessian(gram), spectrum)
    assert 0 < found < 0.2
    assert found * float(spectrum.captured[-1]) == pytest.approx(lost, rel=1e-6)
