"""The reference against the formula, one scalar at a time."""

from __future__ import annotations

import numpy as np
import pytest

from prepack.reference import qe_linear
from tests.cases import Mode, random_layer, random_tokens


@pytest.mark.parametrize("group_size", [-1, 64])
def test_reference_is_the_formula(group_size: int) -> None:
    mode = Mode("f", group_size=group_size, zeros=True, inv_omega=False, experts=3, rank_shared=2, rank_routed=3)
    k, n, m = 128, 8, 4
    layer, x = random_layer(mode, k, n), random_tokens(mode, m, k)
    y = qe_linear(layer, x, "f16")
    router, zeros, down, up, bias = layer.router, layer.zeros, layer.down, layer.up, layer.bias
    assert router is not None and zeros is not None and down is not None and up is not None and bias is not None
    group = k if group_size < 0 else group_size
    for t in range(m):
        scale = np.float32(max(abs(float(v)) for v in x[t])) / np.float32(127)
        scores = [sum(abs(float(x[t, c])) * float(router[c, e]) for c in range(k)) for e in range(3)]
        expert = scores.index(min(scores))
        active = [0, 1] + [2 + expert * 3 + i for i in range(3)]
        h = {r: sum(float(x[t, c]) * float(down[c, r]) for c in range(k)) for r in active}
        for o in range(n):
            total = 0.0
            for c in range(k):
                q = max(-128, min(127, int(np.rint(x[t, c] / scale))))
                total += q * (int(layer.qweight[c, o]) - int(zeros[c // group, o])) * float(layer.scales[c // group, o])
            expected = total * float(scale) + sum(h[r] * float(up[r, o]) for r in active) + float(bias[o])
            assert y[t, o] == pytest.approx(expected, rel=1e-9, abs=1e-9)
