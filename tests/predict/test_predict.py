"""The roofline: what it may never do, and that it gives the figures of the plan that it was made from."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.predict_error import LINEAR_LIMIT, RESULTS, SHARE, STEP_LIMIT, halves, read_rows, spread
from qe_edge.demo import model_path
from qe_edge.numerics.schemes import SCHEMES, get_scheme
from qe_edge.predict.roofline import PHASES, Request, look_up, predict, weight_bytes
from qe_edge.predict.shapes import Linear, block_linears, find_model
from qe_edge.predict.tables import (
    Device,
    accuracy,
    device_table,
    get_device,
    instruction_table,
    model_table,
    timing_table,
)
from qe_edge.predict.variants import WAYS, Adapters, kernel_variant, linear_kernels, linear_work
from qe_edge.predict.work import Kernel, Work
from qe_edge.system.errors import ModelError, UnknownNameError

DEVICES, MODELS = sorted(device_table().devices), sorted(model_table())
SLACK = 1 + 1e-9


def request(model: str = "qwen2-vl-2b", device: str = "orin-agx", scheme: str = "w4a8", **choices: object) -> Request:
    made = Request(find_model(model), get_device(device), get_scheme(scheme), launches="graph")
    return replace(made, **choices)  # type: ignore[arg-type]


def times(wanted: Request) -> list[float]:
    return [row.milliseconds for ways in predict(wanted).values() for row in ways.values()]


@given(
    st.sampled_from(MODELS), st.sampled_from(DEVICES), st.sampled_from(sorted(SCHEMES)),
    st.sampled_from(["bandwidth_gbs", "multiprocessors", "clock_ghz", "int8_macs", "fp16_macs"]), st.integers(2, 9),
)  # fmt: skip
def test_more_of_anything_is_never_slower(model: str, device: str, scheme: str, what: str, times_more: int) -> None:
    slow = request(model, device, scheme)
    fast = replace(slow, device=slow.device.model_copy(update={what: getattr(slow.device, what) * times_more}))
    assert all(after <= before * SLACK for before, after in zip(times(slow), times(fast), strict=True))


@given(st.sampled_from(DEVICES), st.integers(1, 4000), st.integers(1, 500))
def test_more_tokens_are_never_faster_in_prefill_or_with_more_context(device: str, tokens: int, more: int) -> None:
    for phase, field in (("prefill", "prompt"), ("visual", "patches"), ("decode", "context")):
        if field != "context" and tokens <= 16:
            continue  # the decode kernel runs there
        less = predict(request(device=device, **{field: tokens}))[phase]
        longer = predict(request(device=device, **{field: tokens + more}))[phase]
        assert all(less[way].milliseconds <= longer[way].milliseconds * SLACK for way in WAYS)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("model", ["qwen2-vl-2b", "qwen2-vl-7b", "internvl2-8b"])
def test_decoding_in_fp16_is_bound_by_its_weights(model: str, device: str) -> None:
    wanted = request(model, device)
    row, timing = predict(wanted)["decode"]["fp16"], timing_table()
    assert row.bound == "memory"
    streaming = row.work.bytes / (wanted.device.bandwidth_gbs * 1e6 * timing.bandwidth)
    assert streaming < row.milliseconds < 1.7 * streaming + row.launch_milliseconds
    text = wanted.shape.text
    weights = 2 * text.layers * sum(each.in_features * each.out_features for each in block_linears(text))
    assert 0 < row.work.bytes - weights - 2 * text.hidden * text.vocabulary < 0.1 * weights  # activations and cache


@pytest.mark.parametrize("device", DEVICES)
def test_nothing_beats_a_peak(device: str) -> None:
    wanted = request("qwen2-vl-7b", device)
    for ways in predict(wanted).values():
        for row in ways.values():
            peak = wanted.device
            assert row.milliseconds > 1000 * row.work.bytes / (peak.bandwidth_gbs * 1e9)
            assert row.milliseconds > 1000 * row.work.int8_macs / peak.per_second(peak.int8_macs)
            assert row.milliseconds > 1000 * row.work.instructions / peak.per_second(4)
            assert row.milliseconds > row.launch_milliseconds > 0


def test_each_resource_can_be_the_bound() -> None:
    device, timing = get_device("orin-agx"), timing_table()
    for kernel, bound in (
        (Kernel("a", Work(1, bytes=1e9), latency=1, busy=1), "memory"),
        (Kernel("a", Work(1, int8_macs=1e12), latency=1, busy=1), "tensor cores"),
        (Kernel("a", Work(1, fp16_macs=1e12), latency=1, busy=1), "tensor cores"),
        (Kernel("a", latency=1, busy=1e6), "instruction issue"),
        (Kernel("a", latency=1e6, busy=1), "latency"),
    ):
        needed = kernel.microseconds(device, timing)
        assert max(needed, key=lambda name: needed[name]) == bound
        assert kernel.total(device, timing, 2.0) == pytest.approx(2.0 + needed[bound], rel=1e-3)


def test_a_librarys_gemm_may_use_faster_instructions() -> None:
    device, timing, work = get_device("h100"), timing_table(), Work(1, fp16_macs=1e12)
    own, library = (Kernel("a", work, library=which).microseconds(device, timing) for which in (False, True))
    assert own["tensor cores"] / library["tensor cores"] == pytest.approx(2048 / 1270)


def test_a_step_on_orin() -> None:
    """What changed when latencies were learnt: short kernels cost more than their bytes."""
    decode = predict(request())["decode"]
    assert decode["w4a16"].milliseconds == pytest.approx(8.1, rel=0.1)
    assert decode["naive"].milliseconds > 1.2 * decode["plugin"].milliseconds > 1.2 * decode["w4a16"].milliseconds


def test_a_small_grid_leaves_a_large_device_empty() -> None:
    """Ten times the multiprocessors do not make a linear of 48 blocks ten times as fast."""
    orin, h100 = get_device("orin-agx"), get_device("h100")
    like_h100 = orin.model_copy(update={"multiprocessors": 160, "bandwidth_gbs": 10 * orin.bandwidth_gbs})
    slow, fast = (predict(replace(request(), device=each))["decode"]["plugin"] for each in (orin, like_h100))
    assert 2 < slow.milliseconds / fast.milliseconds < 8
    assert fast.bound == "latency"
    assert predict(request(device="h100"))["decode"]["plugin"].milliseconds < slow.milliseconds
    assert h100.measured
    assert not orin.measured


@pytest.mark.parametrize("factors", [Adapters(0, 0, 0), Adapters(64, 0, 0, 0.5), Adapters(64, 32, 8, 2)])
def test_clusters_are_one_launch_whose_tokens_and_correction_cost_something(factors: Adapters) -> None:
    def kernels(device: Device, tokens: int) -> list[Kernel]:
        linear = Linear(3584, (4608,))
        return linear_kernels("plugin", linear, tokens, get_scheme("w4a8"), factors, look_up(device))

    h100, orin = get_device("h100"), get_device("orin-agx")
    times = []
    for tokens in (1, 2, 4):
        (launch,) = kernels(h100, tokens)
        assert launch.name == "cluster"
        times.append(launch.total(h100, timing_table(), 1.0))
        assert "cluster" not in {each.name for each in kernels(orin, tokens)}
        assert "cluster" not in {each.name for each in kernels(h100.model_copy(update={"clusters": False}), tokens)}
    assert times[0] < times[1] < times[2]
    bare = linear_kernels("plugin", Linear(3584, (4608,)), 1, get_scheme("w4a8"), Adapters(0, 0, 0), look_up(h100))
    assert factors.shared == 0 or times[0] > bare[0].total(h100, timing_table(), 1.0)
    assert "cluster" not in {each.name for each in kernels(h100, 5)}


def test_the_stored_accuracy_is_what_the_benchmark_finds() -> None:
    measured = json.loads(RESULTS.read_text(encoding="utf-8"))
    linears, steps = read_rows(measured, "h100")
    _, checked = halves(linears)
    factors, whole = spread(checked, timing_table()), spread(steps, timing_table())
    assert accuracy().rows == len(checked)
    assert accuracy().median == pytest.approx(float(np.median(factors)), abs=2e-3)
    assert accuracy().worst_step == pytest.approx(float(whole.max()), abs=2e-3)
    assert whole.max() <= STEP_LIMIT
    assert np.mean(factors <= LINEAR_LIMIT) >= SHARE


@pytest.mark.parametrize("way", ["plugin", "naive"])
def test_adapters_cost_something(way: str) -> None:
    bare = Adapters(shared=0, routed=0, experts=0)
    for phase in PHASES:
        with_them, without = (predict(request(adapters=each))[phase][way] for each in (Adapters(), bare))  # type: ignore[index]
        assert with_them.work.bytes > without.work.bytes


@pytest.mark.parametrize("way", ["plugin", "naive"])
def test_int4_factors_are_read_and_stored_in_half_the_bytes(way: str) -> None:
    moved, stored = [], []
    for width in (0.0, 0.5, 1.0):
        wanted = request("qwen2-vl-7b", adapters=Adapters(bytes_per_value=width))
        moved.append(predict(wanted)["decode"][way].work.bytes)
        stored.append(weight_bytes(wanted, way))
    for none, half, whole in (moved, stored):
        assert whole > none
        assert half - none == pytest.approx((whole - none) / 2)


def test_separate_launches_are_never_better() -> None:
    for device in DEVICES:
        for ways in predict(request(device=device)).values():
            assert ways["naive"].milliseconds > ways["plugin"].milliseconds
            assert ways["naive"].work.launches > 2 * ways["plugin"].work.launches


def test_every_device_and_scheme_has_its_instruction_counts() -> None:
    table = instruction_table()
    for name, device in device_table().devices.items():
        assert "https://" in device.source, name
        for scheme in SCHEMES.values():
            kind = kernel_variant(scheme)
            assert table.prefill_per_1000_mac[device.chip][kind] > 0
            assert table.decode_per_kib[device.chip][f"{kind}_t8"] < table.decode_per_kib[device.chip][f"{kind}_t16"]
    assert table.edge_llm.decode(1) == 198
    assert table.edge_llm.decode(3) == 316
    assert table.edge_llm.decode(7) is None


def test_schemes_of_3_bits_have_their_kernels_and_bytes() -> None:
    kinds = {name: kernel_variant(scheme) for name, scheme in SCHEMES.items()}
    assert {name for name, kind in kinds.items() if "w3" in kind} == {"w3a8", "w3a16", "w2a16"}
    assert (kinds["w3a8"], kinds["w3a16"], kinds["w2a16"]) == ("s8w3_c", "hw3_g128z", "hw3_g64z")
    bare = Adapters(shared=0, routed=0, experts=0)
    for three, four in (("w3a8", "w4a8"), ("w3a16", "w4a16")):
        moved = [
            sum(linear_work("plugin", each, 1, get_scheme(name), bare, look_up(get_device("orin-agx"))).bytes
                for each in block_linears(find_model("qwen2-vl-7b").text))
            for name in (three, four)
        ]  # fmt: skip
        assert 0.75 < moved[0] / moved[1] < 0.77  # scales, zero points and activations are as before


def test_quantized_weights_are_smaller() -> None:
    wanted = request("qwen2-vl-7b")
    sizes = {way: weight_bytes(wanted, way) for way in WAYS}
    assert sizes["w4a16"] < sizes["plugin"] < sizes["fp16"] / 2
    assert sizes["fp16"] == pytest.approx(2 * 7.75e9, rel=0.05)  # parameters without the embedding table


QWEN = {
    "model_type": "qwen2_vl", "hidden_size": 1536, "num_hidden_layers": 28, "intermediate_size": 8960,
    "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936,
    "vision_config": {"depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "spatial_merge_size": 2, "hidden_size": 1536},
}  # fmt: skip
INTERNVL = {
    "model_type": "internvl", "downsample_ratio": 0.5,
    "text_config": {
        "hidden_size": 2048, "num_hidden_layers": 24, "intermediate_size": 8192, "num_attention_heads": 16,
        "num_key_value_heads": 8, "vocab_size": 92553,
    },
    "vision_config": {"hidden_size": 1024, "num_hidden_layers": 24, "intermediate_size": 4096},
}  # fmt: skip


@pytest.mark.parametrize(("config", "name"), [(QWEN, "qwen2-vl-2b"), (INTERNVL, "internvl2-2b")])
def test_a_folder_gives_the_shapes_of_the_table(config: dict[str, object], name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    found, known = find_model(str(tmp_path)), find_model(name)
    assert found.model_copy(update={"title": known.title, "refused": known.refused}) == known


def test_models_that_are_not_quantized_are_marked(tmp_path: Path) -> None:
    refused = {name for name in MODELS if find_model(name).refused}
    assert refused == {"internvl2-2b", "internvl2-8b"}
    config = json.loads((model_path() / "config.json").read_text(encoding="utf-8"))
    assert find_model("demo").refused == ""
    config["text_config"]["layer_types"][1] = "chunked_attention"
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert "'chunked_attention', which cannot be exported" in find_model(str(tmp_path)).refused


def test_names_of_the_hub_and_the_demo_are_known() -> None:
    assert find_model("Qwen/Qwen2-VL-7B-Instruct") == find_model("qwen2-vl-7b")
    assert find_model("demo").text.layers == 4


def test_what_cannot_be_predicted(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="There is no device 'orin'") as caught:
        get_device("orin")
    assert all(name in caught.value.remedy for name in DEVICES)
    with pytest.raises(UnknownNameError, match="no folder or model 'qwen3'") as caught:
        find_model("qwen3")
    assert "qwen2-vl-72b" in caught.value.remedy
    text = {"num_attention_heads": 0, "hidden_size": 64, "num_hidden_layers": 1}
    huge = {**QWEN, "num_hidden_layers": 2**40}
    for values in (
        {},
        {"vision_config": {}},
        {**INTERNVL, "model_type": "llava"},
        {**INTERNVL, "text_config": text},
        huge,
    ):
        (tmp_path / "config.json").write_text(json.dumps(values), encoding="utf-8")
        with pytest.raises(ModelError, match=r"no config\.json of a Qwen2-VL or InternVL|is wrong"):
            find_model(str(tmp_path))
    for damaged in ("{", "[]", "[" * 9999):
        (tmp_path / "config.json").write_text(damaged, encoding="utf-8")
        with pytest.raises(ModelError, match=r"config\.json' (is not valid JSON|holds no JSON table)") as refused:
            find_model(str(tmp_path))
        assert "qwen2-vl-2b" in refused.value.remedy


def test_a_device_needs_every_figure() -> None:
    values = get_device("thor").model_dump()
    del values["bandwidth_gbs"]
    with pytest.raises(ValueError, match="bandwidth_gbs"):
        Device.model_validate(values)
