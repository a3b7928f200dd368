"""A head of 4 bits: its checkpoint, bits, plan, graphs and engines."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from qe_edge.budget.accounting import count_bits
from qe_edge.export.exporter import export_model
from qe_edge.export.lowering.tensorrt import lower_for_tensorrt
from qe_edge.layers.linear import quantized_linears
from qe_edge.models.loading import load_model
from qe_edge.models.quantized import load_quantized, save_quantized
from qe_edge.numerics.grids import WeightGrid, quantize_weight
from qe_edge.quantization.plan import make_plan
from qe_edge.quantization.quantizer import quantize
from qe_edge.recipes.recipe import make_recipe
from qe_edge.runtime.engine import VisionLanguageEngine
from qe_edge.system.errors import RecipeError, UnknownNameError
from tests.models.conversations import greedy, torch_logits

HEAD = "lm_head"
RECIPE = make_recipe(method="rtn", scheme="w4a8", head="int4", calibration={"samples": 4})


@pytest.fixture(scope="module")
def folder(small: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("head")
    loaded, recipe = quantize(small, RECIPE)
    save_quantized(loaded, recipe, out / "checkpoint")
    export_model(out / "checkpoint", out / "onnx")
    return out


def test_the_head_is_a_layer_of_the_checkpoint(small: str, folder: Path, samples: list) -> None:
    plain, _ = quantize(small, RECIPE.model_copy(update={"head": "none"}), samples)
    loaded = load_quantized(folder / "checkpoint")
    layers = quantized_linears(loaded.model)
    assert set(layers) == {*quantized_linears(plain.model), HEAD}
    assert (layers[HEAD].weight_bits, layers[HEAD].group_size, layers[HEAD].activation_bits) == (4, 32, 0)
    # the embedding, which was the same matrix, keeps its precision
    embedding = loaded.model.get_input_embeddings().weight
    assert torch.equal(embedding, plain.model.get_input_embeddings().weight)
    error = (layers[HEAD].decoded_weight() - embedding.float()).norm() / embedding.float().norm()
    assert 0.02 < error < 0.2


def test_it_is_rounded_on_what_reaches_it(small: str, folder: Path, samples: list) -> None:
    """GPTQ leaves less error in the logits than rounding to nearest on the same grid, and more in the weights."""
    original, quantized = load_model(small, torch.float32), load_quantized(folder / "checkpoint")
    head = quantized_linears(quantized.model)[HEAD]
    encoded = original.family.encode(original.processor, samples, answers=True)
    with torch.no_grad():
        decoder = original.model.get_decoder()
        states = []
        handle = decoder.norm.register_forward_hook(lambda _module, _inputs, output: states.append(output))
        original.model(**original.family.torch_inputs(encoded))
        handle.remove()
    inputs = states[0][torch.from_numpy(encoded.attention_mask.astype(bool))]
    weight = original.model.get_output_embeddings().weight.detach()
    nearest = quantize_weight(weight, WeightGrid(4, 32)).decode()
    errors = [(inputs @ (one - weight).T).square().sum() for one in (head.decoded_weight(), nearest)]
    assert errors[0] < 0.8 * errors[1]


def test_its_bits_are_counted_and_planned(small: str, folder: Path, samples: list) -> None:
    loaded = load_quantized(folder / "checkpoint")
    bits = count_bits(loaded.model, {block.name: block.group for block in loaded.family.blocks(loaded.model)})
    (head,) = (layer for layer in bits.layers if layer.name == HEAD)
    assert head.group == "language"
    assert head.bits.stored_bits == 4 + 16 / 32
    plan = make_plan(small, RECIPE, samples)
    assert {layer.name: layer.bits for layer in plan.layers} == {layer.name: layer.bits for layer in bits.layers}
    size = (folder / "checkpoint/model.safetensors").stat().st_size
    assert abs(plan.checkpoint_bytes - size) < 0.02 * size


def test_graphs_equal_the_quantized_model(folder: Path, samples: list) -> None:
    loaded = load_quantized(folder / "checkpoint")
    loaded.model.float()
    engine = VisionLanguageEngine.load(folder / "onnx", threads=1)
    encoded = engine.encode(samples, answers=True)
    valid = encoded.attention_mask.astype(bool)
    wanted = torch_logits(loaded, samples)[valid]
    assert np.abs(engine.logits(encoded)[valid] - wanted).max() / np.abs(wanted).max() < 1e-2  # codes of 8 bits
    assert engine.generate_ids(engine.encode(samples), 4) == greedy(loaded, samples, 4)


def test_the_head_is_int4_in_every_graph(folder: Path) -> None:
    graph = onnx.load(folder / "onnx/language.onnx", load_external_data=False).graph
    types = {value.name: value.data_type for value in graph.initializer}
    assert types[f"{HEAD}.qweight"] == onnx.TensorProto.INT4
    assert [node.op_type for node in graph.node][-2:] == ["DequantizeLinear", "MatMul"]
    precision = lower_for_tensorrt(ir.load(folder / "onnx/language.onnx"))
    assert precision.products[HEAD] == "int4 weights, float16"


def test_recipes_that_cannot_be() -> None:
    with pytest.raises(UnknownNameError, match="int4"):
        make_recipe(head="int5")
    with pytest.raises(RecipeError, match="language model hands it"):
        make_recipe(head="int4", modules=("visual",))


def test_a_rotated_model_in_bfloat16_has_one_too(small: str, samples: list) -> None:
    """Its last norm ends in a product that undoes the rotation."""
    recipe = make_recipe(method="quarot", scheme="w4a16", head="int4", calibration={"samples": 2})
    plain, quantized = (
        quantize(load_model(small, torch.bfloat16), recipe.model_copy(update={"head": head}), samples)[0]
        for head in ("none", "int4")
    )
    assert next(plain.model.parameters()).dtype == torch.bfloat16
    wanted, found = (torch_logits(loaded, samples).astype(np.float32) for loaded in (plain, quantized))
    assert 0 < np.abs(found - wanted).mean() / np.abs(wanted).mean() < 0.15
