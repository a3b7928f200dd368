"""Rung 7: TensorRT-RTX parses a lowered model and builds an engine with the plugin, without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from emulator.build import ROOT
from prepack.lower import lower
from tests.cases import Mode
from tests.modes import MODES
from tests.onnx_models import canonical_model

PLUGIN = Path(os.environ.get("QE_PLUGIN", ROOT / "build/plugin/libqe_plugin.so"))


def build(model: bytes, folder: Path) -> dict[str, Any]:
    path = folder / "model.onnx"
    path.write_bytes(model)
    environment = os.environ | {"LD_LIBRARY_PATH": str(folder / "lib"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.trt_build", str(path), str(PLUGIN)]
    (folder / "lib").mkdir(exist_ok=True)
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    result = dict(json.loads(done.stdout.splitlines()[-1]))
    result["messages"] += done.stderr.splitlines()  # the plugin's, when TensorRT hands it no logger
    return result


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_every_mode_builds(dtype: str, tmp_path: Path) -> None:
    modes = [mode for mode in MODES if mode.dtype == dtype]
    features = [256] * (len(modes) + 1)
    result = build(lower(canonical_model(modes, features)).SerializeToString(), tmp_path)
    assert result["errors"] == [] and result["parsed"]
    assert [kind for _, kind in result["layers"]].count("PLUGIN_V3") == len(modes)
    assert result["engine_bytes"] > 256 * 256 // 2 * len(modes), result["messages"]


def test_a_node_that_was_not_lowered_is_refused(tmp_path: Path) -> None:
    result = build(canonical_model([Mode("w4a8")], [256, 256]).SerializeToString(), tmp_path)
    assert not result["parsed"]
    assert any("not lowered" in message for message in result["messages"])


def test_3_bit_layers_take_3_bits_in_the_engine(tmp_path: Path) -> None:
    """The same layer with 3- and with 4-bit weights: the engines differ by the bits."""
    sizes = {}
    for bits in (3, 4):
        for name, act_bits, group in ((f"w{bits}a8", 8, -1), (f"w{bits}a16", 0, 128)):
            mode = Mode(name, act_bits, group, zeros=act_bits == 0, weight_bits=bits, experts=0, rank_shared=0)
            folder = tmp_path / name
            folder.mkdir()
            result = build(lower(canonical_model([mode], [1024, 1024])).SerializeToString(), folder)
            assert result["errors"] == [] and [kind for _, kind in result["layers"]].count("PLUGIN_V3") == 1
            sizes[bits, act_bits] = result["engine_bytes"]
    for act_bits in (8, 0):
        assert sizes[4, act_bits] - sizes[3, act_bits] == pytest.approx(1024 * 1024 / 8, rel=0.01)


def test_int4_factors_take_4_bits_in_the_engine(tmp_path: Path) -> None:
    """The same layer with INT8 and with INT4 factors: the engines differ by half of the factors' bytes."""
    sizes = {}
    for bits in (8, 4):
        mode = Mode(f"int{bits}", adapter_bits=bits, experts=8, rank_shared=64, rank_routed=64)
        folder = tmp_path / mode.name
        folder.mkdir()
        result = build(lower(canonical_model([mode], [1024, 1024])).SerializeToString(), folder)
        assert result["errors"] == [] and [kind for _, kind in result["layers"]].count("PLUGIN_V3") == 1
        sizes[bits] = result["engine_bytes"]
    assert sizes[8] - sizes[4] == pytest.approx((64 + 8 * 64) * (1024 + 1024) / 2, rel=0.01)


def damaged(change: str) -> bytes:
    """A lowered model with one thing wrong."""
    model = lower(canonical_model([Mode("w4a8", adapter_bits=4)], [256, 256]))
    node = model.graph.node[0]
    if change == "weight of another size":
        weight = next(t for t in model.graph.initializer if t.name.endswith("weight"))
        weight.dims[0] -= 1
        weight.raw_data = weight.raw_data[: weight.dims[0] * weight.dims[1]]
    elif change == "one input too few":
        del node.input[-1]
    elif change == "rank beyond the limit":
        next(a for a in node.attribute if a.name == "rank_shared").i = 4096
    elif change == "other in_features than x":
        next(a for a in node.attribute if a.name == "in_features").i = 512
    elif change == "newer layout":
        next(a for a in node.attribute if a.name == "layout_version").i = 99
    elif change == "3 bits of weights that have 4":
        next(a for a in node.attribute if a.name == "weight_bits").i = 3
    elif change == "INT4 factors said to be INT8":
        next(a for a in node.attribute if a.name == "adapter_bits").i = 8
    elif change == "factors of 5 bits":
        next(a for a in node.attribute if a.name == "adapter_bits").i = 5
    elif change == "weights of 5 bits":
        next(a for a in node.attribute if a.name == "weight_bits").i = 5
    elif change == "float32 activations":
        model.graph.input[0].type.tensor_type.elem_type = 1
        model.graph.output[0].type.tensor_type.elem_type = 1
    return bytes(model.SerializeToString())


@pytest.mark.parametrize(
    "change",
    [
        "weight of another size", "one input too few", "rank beyond the limit", "other in_features than x",
        "newer layout", "float32 activations", "3 bits of weights that have 4", "weights of 5 bits",
        "INT4 factors said to be INT8", "factors of 5 bits",
    ],
)  # fmt: skip
def test_a_damaged_model_ends_in_an_error(change: str, tmp_path: Path) -> None:
    result = build(damaged(change), tmp_path)
    assert result["engine_bytes"] == 0
    assert result["messages"] + result["errors"]
