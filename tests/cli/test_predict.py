"""`qe-edge predict`: everything that it prints says that it is predicted."""

from __future__ import annotations

import json

from tests.cli.running import Run, assert_two_lines


def test_the_table(cli: Run) -> None:
    outcome = cli("predict", "qwen2-vl-72b", "--device", "orin-nano")
    assert outcome.code == 0, outcome.err
    assert "predicted, not measured" in outcome.out.splitlines()[0]
    assert "Predicted ms" in outcome.out
    assert "Orin Nano 8 GB, Super mode: not yet run on hardware" in outcome.out
    assert "measured times lie within" in outcome.out
    measured = cli("predict", "qwen2-vl-2b", "--device", "h100").out
    assert "not yet run on hardware" not in measured
    assert "FP16 does not fit into 8 GiB" in outcome.out


def test_the_data(cli: Run) -> None:
    words = ["predict", "demo", "--device", "thor", "--scheme", "w3a16", "--prompt-tokens", "64", "--json"]
    data = json.loads(cli(*words).out)
    assert (data["kind"], data["measured"], data["launches"]) == ("predicted", False, "stream")
    assert set(data["predicted"]) == {"visual", "prefill", "decode"}
    row = data["predicted"]["decode"]["plugin"]
    assert row["work"]["int8_macs"] == 0  # of a scheme with 16-bit activations
    assert row["milliseconds"] > row["launch_milliseconds"] > 0
    assert data["device"]["source"].startswith("NVIDIA")
    graph = json.loads(cli(*words, "--cuda-graph").out)
    assert graph["predicted"]["decode"]["plugin"]["milliseconds"] < row["milliseconds"]


def test_unknown_names(cli: Run) -> None:
    assert_two_lines(cli("predict", "demo", "--device", "tx2"), "There is no device 'tx2'", "orin-nano")
    assert_two_lines(cli("predict", "gpt", "--device", "thor"), "no folder or model 'gpt'", "qwen2-vl-2b")
    assert_two_lines(cli("predict", "demo", "--device", "thor", "--scheme", "w5"), "There is no scheme", "w4a8")


def test_a_model_that_is_not_quantized_is_said(cli: Run) -> None:
    words = ["predict", "internvl2-8b", "--device", "thor"]
    assert "'qe-edge quantize' refuses this model: its text model InternLM2" in cli(*words).out
    assert "InternLM2" in json.loads(cli(*words, "--json").out)["quantize_refuses"]
    assert "refuses" not in cli("predict", "qwen2-vl-2b", "--device", "thor").out
