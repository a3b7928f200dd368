"""Bits of layers that can be counted by hand, and of a whole checkpoint that can be weighed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from qe_edge.budget.accounting import count_bits, file_sizes, layer_counts
from qe_edge.checkpoint.safetensors_check import check_safetensors
from qe_edge.layers.linear import Adapters, QELinear, QuantizedLinear
from qe_edge.models.quantized import WEIGHTS, load_quantized
from qe_edge.numerics.grids import QuantizedWeight, WeightGrid, quantize_weight
from qe_edge.validate.subjects import block_groups

OUT, IN = 8, 16
WIDTH = {"U8": 1, "I8": 1, "F16": 2, "BF16": 2, "F32": 4}


def weight(grid: WeightGrid) -> QuantizedWeight:
    return quantize_weight(torch.randn(OUT, IN, generator=torch.Generator().manual_seed(0)), grid)


def with_adapters() -> QuantizedLinear:
    """Shared rank 2 and two experts of rank 1 in int8."""
    adapters = Adapters(
        down=torch.zeros(4, IN, dtype=torch.int8),
        up=torch.zeros(OUT, 4, dtype=torch.int8),
        down_scale=torch.zeros(4, dtype=torch.float16),
        up_scale=torch.zeros(OUT, dtype=torch.float16),
        rank_shared=2,
        rank_routed=1,
        num_experts=2,
        router=torch.zeros(2, IN, dtype=torch.float16),
    )
    return QuantizedLinear(weight(WeightGrid(4)), 8, torch.ones(IN, dtype=torch.float16), adapters)


def test_a_plain_layer() -> None:
    bits = layer_counts({"a": QELinear(QuantizedLinear(weight(WeightGrid(4)), 8))})["a"]
    assert bits.weights == 128
    assert (bits.codes, bits.scales, bits.adapters, bits.router) == (512, 8 * 16, 0, 0)
    assert bits.stored_bits == bits.read_bits == 5


def test_three_bit_codes_are_stored_in_three() -> None:
    bits = layer_counts({"a": QELinear(QuantizedLinear(weight(WeightGrid(3, 16, symmetric=False)), 0))})["a"]
    assert bits.codes == 3 * 128
    assert bits.scales == 8 * 16 + 8 * 8  # one scale and one zero point of a byte for every row
    assert bits.stored_bits == 4.5


def test_adapters_and_what_one_token_reads() -> None:
    bits = layer_counts({"a": QELinear(with_adapters())})["a"]
    down, up, down_scale, up_scale, router = 4 * 16 * 8, 8 * 4 * 8, 4 * 16, 8 * 16, 2 * 16 * 16
    scales = 8 * 16 + 16 * 16
    assert bits.adapters == down + up + down_scale + up_scale
    assert bits.stored_bits == (512 + scales + bits.adapters + router) / 128
    assert bits.adapter_bits == (bits.adapters + router) / 128
    one_expert = 0.75 * (down + up + down_scale)  # rank 2 + 1 of 4
    assert bits.read_bits == (512 + scales + one_expert + up_scale + router) / 128


def test_tensors_that_siblings_share_count_once() -> None:
    stacked = with_adapters()
    whole = layer_counts({"qkv": QELinear(stacked)})["qkv"]
    parts = layer_counts({name: QELinear(part) for name, part in zip("qkv", stacked.split([4, 2, 2]), strict=True)})
    for field in ("weights", "codes", "scales", "adapters", "router", "read"):
        assert sum(getattr(part, field) for part in parts.values()) == getattr(whole, field)
    assert parts["q"].router == 2 * parts["k"].router == whole.router / 2


def test_a_bias_is_the_originals_own() -> None:
    plain, biased = (QELinear(QuantizedLinear(weight(WeightGrid(4)), 8), bias) for bias in (None, torch.zeros(OUT)))
    assert layer_counts({"a": plain}) == layer_counts({"a": biased})
    assert count_bits(nn.Sequential(biased), {}).parameters == 128 + OUT


def test_a_whole_model_weighs_what_its_file_holds(checkpoint: Path) -> None:
    loaded = load_quantized(checkpoint)
    bits = count_bits(loaded.model, block_groups(loaded))
    header = check_safetensors(checkpoint / WEIGHTS)
    held = sum(WIDTH[dtype] * torch.Size(shape).numel() for dtype, shape in header.values())
    assert bits.model_bytes == held
    assert set(bits.groups) == {"visual", "merger", "language"}
    assert sum(group.weights for group in bits.groups.values()) == bits.total.weights
    assert bits.total.stored_bits > bits.total.read_bits > 4


def test_parameters_are_the_originals(checkpoint: Path, small: Path) -> None:
    from qe_edge.models.loading import load_model

    loaded = load_quantized(checkpoint)
    original = load_model(str(small)).model
    assert count_bits(loaded.model, {}).parameters == sum(tensor.numel() for tensor in original.parameters())


def test_files_are_listed_largest_first(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "a.json").write_bytes(b"12")
    (tmp_path / "below" / "b.bin").write_bytes(b"12345")
    sizes = file_sizes("onnx", tmp_path)
    assert [(file.name, file.size) for file in sizes] == [("below/b.bin", 5), ("a.json", 2)]
    with pytest.raises(ValueError, match="frozen"):
        sizes[0].size = 0  # type: ignore[misc]
