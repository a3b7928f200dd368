"""What the routing benchmark reports: errors of the layers that run, and peers of the same bytes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.routing import COLUMNS, Layer, Row, energies, main, measure
from qe_edge import make_recipe, quantize_linear
from qe_edge.calibration.sensitivity import IMAGE
from qe_edge.calibration.statistics import StatisticsCollector, StatisticsRequest
from tests.layers import outlier_layer
from tests.small_vlm import write_small_vlm

SIDE, CALIBRATION = 256, 1500


@pytest.fixture(scope="module")
def rows() -> dict[str, Row]:
    weight, x, types = outlier_layer(SIDE, SIDE, CALIBRATION + 500, types=4)
    kinds = torch.from_numpy(np.where(types % 2, IMAGE, 0).astype(np.int8))
    collector = StatisticsCollector("layer", SIDE, [weight], StatisticsRequest(True, 8192, 8), 0)
    collector.update(x[:CALIBRATION], kinds[:CALIBRATION])
    layer = Layer("layer", weight, collector.finish()[0], x[CALIBRATION:], kinds[CALIBRATION:] == IMAGE)
    return {row.column: row for row in measure(layer, "w4a16", "nearest", None)}


def test_every_correction_has_its_row(rows: dict[str, Row]) -> None:
    assert set(rows) == set(COLUMNS) - {"refined"}


@pytest.mark.parametrize("kind", ["image", "text"])
def test_errors_stand_in_the_order_that_is_certain(rows: dict[str, Row], kind: str) -> None:
    error = {column: getattr(row, kind) for column, row in rows.items()}
    assert error["oracle"] <= error["experts"] < error["random"] < error["none"]
    assert error["stored"] < error["read"] <= error["rank"] < error["none"]


def test_peers_have_the_bytes_that_they_are_named_for(rows: dict[str, Row]) -> None:
    one_rank = 8 * 2 / SIDE + 16 / SIDE**2  # bits per weight of one more rank
    assert abs(rows["experts"].read - rows["read"].read) < one_rank
    assert abs(rows["experts"].stored - rows["stored"].stored) < one_rank
    assert rows["rank"].read < rows["read"].read


def test_every_expert_is_forced_and_then_let_go() -> None:
    weight, x, _ = outlier_layer(SIDE, SIDE, CALIBRATION, types=4)
    layer = quantize_linear(weight, x, make_recipe(method="qe", scheme="w4a16", options={"rounding": "nearest"}))
    wanted = x @ weight.T
    error = energies(layer, x, wanted)
    picked = layer.expert_index(x)
    assert picked is not None
    assert len(set(picked.tolist())) == layer.num_experts
    routed = (layer(x) - wanted).square().sum(1)
    assert torch.allclose(error.gather(1, picked.unsqueeze(1))[:, 0].float(), routed, rtol=1e-4)


@pytest.mark.slow
def test_it_runs_on_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_small_vlm(tmp_path / "model")
    call = "routing --blocks 1 --samples 4 --questions 4 --rounding nearest --calibration demo --evaluation demo"
    monkeypatch.setattr(sys, "argv", [*call.split(), str(folder)])
    assert main() == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["held_out_tokens"]["image"] > 0
    assert found["held_out_tokens"]["text"] > 0
    assert {row["layer"] for row in found["rows"]} >= {"1.self_attn.q_proj", "1.mlp.gate_proj"}
    assert found["relative"]["nearest image"]["read"] == 1
    monkeypatch.setattr(sys, "argv", [*call.split(), str(folder), "--blocks", "7"])
    assert main() != 0
    assert "below 2" in capsys.readouterr().err
