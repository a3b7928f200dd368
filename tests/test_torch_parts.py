"""Methods whose layers only PyTorch runs: against references, on disk, in the count of bits, and at the exporter."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qe_edge import QELinear, make_recipe, quantize_linear
from qe_edge.budget.accounting import layer_counts
from qe_edge.checkpoint.layer_files import read_layers, write_layers
from qe_edge.checkpoint.part_sizes import PartSizes
from qe_edge.deploy.order import make_order
from qe_edge.export.layers import check_layers
from qe_edge.methods import METHODS
from qe_edge.methods.quip import incoherent_scale
from qe_edge.methods.spqr import spqr_round
from qe_edge.numerics.grids import WeightGrid
from qe_edge.numerics.orthogonal import random_orthogonal
from qe_edge.system.errors import ArtifactError, ModelError, RecipeError
from tests.layers import correlated_layer, outlier_layer, problem_of
from tests.reference.atom import atom
from tests.reference.bwa import bwa
from tests.reference.quip import quip
from tests.reference.spqr import spqr

KINDS = ["masquant", "quip", "quipsharp", "qbb", "bwa", "spqr", "atom"]


def layer_of(method: str, scheme: str = "w4a8", **options: object) -> QELinear:
    weight, x, kind = outlier_layer(48, 128, 700)
    if method == "masquant":
        chosen = METHODS[method](METHODS[method].Options(**options))
        return QELinear(chosen.quantize(problem_of(chosen, scheme, weight, x, torch.from_numpy(kind < 3))))
    return quantize_linear(weight, x, make_recipe(method=method, scheme=scheme, options=options))


def effective(layer: QELinear) -> np.ndarray:
    """The weight `[out, in]` that a layer without activation rounding computes with."""
    return layer(torch.eye(layer.in_features)).T.double().numpy()


def differing(found: np.ndarray, expected: np.ndarray) -> float:
    return float((np.abs(found - expected) > 1e-4 * np.abs(expected).max()).mean())


def test_quip_equals_the_reference() -> None:
    weight, x = correlated_layer(16, 48, 400)
    options = {"clip": False, "damping": 0.02}
    layer = quantize_linear(weight, x, make_recipe(method="quip", scheme="w4a8", options=options))
    layer.activation_bits = 0
    parts = layer.parts
    assert parts is not None
    gram = (x.double().T @ x.double() / len(x)).numpy()
    scale = 1 / layer.inv_omega.double().numpy() if layer.inv_omega is not None else np.ones(48)
    np.testing.assert_allclose(scale, incoherent_scale(torch.from_numpy(np.diag(gram).copy()), weight), rtol=1e-3)
    bases = [np.kron(*(part.double().numpy() for part in pair)) for pair in
             ((parts.in_left, parts.in_right), (parts.out_left, parts.out_right)) if pair[0] is not None]  # fmt: skip
    expected = quip(weight.double().numpy(), gram, *bases, scale, 0.02)
    assert np.linalg.norm(effective(layer) - expected) < 0.02 * np.linalg.norm(expected - weight.numpy())


def test_incoherence_is_what_helps() -> None:
    weight, x, _ = outlier_layer(64, 128, 900)
    recipes = [make_recipe(method=method, scheme="w4a6") for method in ("quip", "gptq")]
    rotated, plain = (quantize_linear(weight, x, recipe) for recipe in recipes)
    target = x @ weight.T
    assert (rotated(x) - target).norm() < 0.5 * (plain(x) - target).norm()


def test_random_orthogonal_matrices_are_uniform_enough() -> None:
    rows = torch.randn(3, 96, dtype=torch.float64)
    rotation = random_orthogonal(96, np.random.default_rng(0))
    torch.testing.assert_close(rotation.back(rotation(rows)), rows)
    torch.testing.assert_close(rotation(rows), rows @ rotation.matrix())
    halved = rotation.halved()
    torch.testing.assert_close(halved.inverse_transposed()(rows) @ halved.matrix().T, rows)


@pytest.mark.parametrize(("scheme", "bits", "group", "symmetric"), [("w3a16", 3, 16, False), ("w4a8", 4, 48, True)])
def test_spqr_equals_the_reference(scheme: str, bits: int, group: int, symmetric: bool) -> None:
    weight, x = correlated_layer(12, 48, 400)
    layer = quantize_linear(weight, x, make_recipe(method="spqr", scheme=scheme, options={"outliers": 0.03}))
    layer.activation_bits = 0
    gram = (x.double().T @ x.double() / len(x)).numpy()
    hessian = gram + 0.01 * np.diag(gram).mean() * np.eye(48)
    expected, outliers = spqr(weight.double().numpy(), hessian, bits, group, 0.03, symmetric=symmetric)
    assert 5 < outliers.sum() < 40
    assert layer.parts is not None
    found = layer.parts.outliers(12, 48)
    assert found is not None
    assert np.mean((found.numpy() != 0) != outliers) < 0.004
    assert differing(effective(layer), expected) < 0.02


def test_a_lone_extreme_weight_is_an_outlier() -> None:
    """Its own rounding costs nothing, but its range costs all others."""
    torch.manual_seed(0)
    weight = torch.randn(4, 64)
    weight[2, 5] = 40.0
    _, outliers, _ = spqr_round(weight, torch.eye(64).double(), WeightGrid(4), share=1 / 256)
    assert outliers.nonzero().tolist() == [[2, 5]]


@pytest.mark.parametrize(("scheme", "bits", "group"), [("w2a16", 2, 16), ("w3a8", 3, 48), ("w4a8", 4, 48)])
def test_free_values_equal_the_reference(scheme: str, bits: int, group: int) -> None:
    weight, x = correlated_layer(12, 48, 400)
    layer = quantize_linear(weight, x, make_recipe(method="bwa", scheme=scheme, options={"rounds": 8}))
    layer.activation_bits = 0
    gram = (x.double().T @ x.double() / len(x)).numpy()
    hessian = gram + 0.01 * np.diag(gram).mean() * np.eye(48)
    expected = bwa(weight.double().numpy(), hessian, bits, group, 8)
    assert differing(effective(layer), expected) < 0.02
    other = quantize_linear(weight, x, make_recipe(method="gptq", scheme=scheme))
    other.activation_bits = 0
    lost = [(one(x) - x @ weight.T).norm() for one in (layer, other)]
    assert lost[0] < 0.85 * lost[1]


def test_spqr_without_outliers_is_gptq() -> None:
    weight, x = correlated_layer(32, 256, 700)
    own = quantize_linear(weight, x, make_recipe(method="spqr", scheme="w3a16", options={"outliers": 0}))
    other = quantize_linear(weight, x, make_recipe(method="gptq", scheme="w3a16"))
    assert own.parts is None
    assert (own.codes() != other.codes()).float().mean() < 0.01


@pytest.mark.parametrize("clip", [False, True])
def test_atom_equals_the_reference(clip: bool) -> None:
    weight, x = correlated_layer(10, 96, 500)
    layer = quantize_linear(weight, x, make_recipe(method="atom", scheme="w4a6", options={"clip": clip}))
    assert layer.fine_codes is not None
    assert layer.fine_codes.shape == (10, 32)
    assert layer.group_size == layer.activation_group == 64
    gram = (x.double().T @ x.double() / len(x)).numpy()
    expected = atom(weight.double().numpy(), gram, 4, 64, 32)
    layer.activation_bits = 0
    found = effective(layer)
    if not clip:
        assert differing(found, expected) < 0.02
    errors = [np.linalg.norm(x.double().numpy() @ (part - weight.double().numpy()).T) for part in (found, expected)]
    assert errors[0] < 1.1 * errors[1]


@pytest.mark.parametrize("method", KINDS)
def test_layers_survive_the_disk_and_their_bits_are_foreseen(method: str, tmp_path: Path) -> None:
    layer = layer_of(method)
    write_layers(tmp_path / "layer.safetensors", {"a": layer})
    again = read_layers(tmp_path / "layer.safetensors")["a"]
    x = torch.randn(5, 128)
    assert torch.equal(layer(x), again(x))
    stored = 8 * sum(tensor.nbytes for tensor in again.state_dict().values())
    count = layer_counts({"a": layer})["a"]
    assert count.stored_bits * count.weights == stored
    recipe = make_recipe(method=method, scheme="w4a8")
    planned = QELinear(recipe.build_method().empty(48, 128, recipe.get_scheme()))
    foreseen = layer_counts({"a": planned})["a"]
    assert foreseen.stored_bits == pytest.approx(count.stored_bits, rel=0.02)


@pytest.mark.parametrize(
    ("method", "tensor", "sentence"),
    [("spqr", "outlier_columns", "an outlier lies outside"), ("spqr", "outlier_starts", "an outlier lies outside"),
     ("atom", "order", "'order' is no order"), ("quip", "in_left", "tensor 'in_left' is missing"),
     ("masquant", "image_up", "tensor 'image_up' is missing")],
)  # fmt: skip
def test_damaged_parts_are_refused(method: str, tensor: str, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "layer.safetensors"
    write_layers(path, {"a": layer_of(method)})
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    if "is missing" in sentence:
        del tensors[f"a.{tensor}"]
    else:
        tensors[f"a.{tensor}"][1] = 30_000
    save_file(tensors, path, metadata)
    with pytest.raises(ArtifactError, match=sentence):
        read_layers(path)


def test_rows_of_outliers_that_pass_32_bits_are_refused() -> None:
    starts = torch.tensor([0, 2**31 - 1, -(2**31), -1, 3], dtype=torch.int32)
    tensors = {"outlier_starts": starts, "outlier_columns": torch.zeros(3, dtype=torch.int16)}
    assert PartSizes(outliers=3).build(tensors, 16)[1] == "an outlier lies outside it"


@pytest.mark.parametrize("method", KINDS)
def test_the_exporter_says_no_before_it_traces(method: str) -> None:
    with pytest.raises(ModelError, match=r"layer 'a' cannot be exported: the operator has no .*load_quantized"):
        check_layers({"a": layer_of(method)})
    with pytest.raises(RecipeError, match=f"'{method}' cannot be exported: its .* no place in the operator"):
        make_order("no such model", make_recipe(method=method))


def test_every_other_method_can_be_exported() -> None:
    assert {name for name in METHODS if METHODS[name](METHODS[name].Options()).torch_only} == set(KINDS)
