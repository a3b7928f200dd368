"""What the plugin cannot do is said before any long work, by the library itself."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest

from qe_edge.calibration.sources import load_samples
from qe_edge.export.build import build_engines
from qe_edge.export.lowering.plugin import layer_forms
from qe_edge.export.plugin_check import LayerForm, check_forms, choose_plugin
from qe_edge.export.targets import get_target
from qe_edge.prepack.lower import LAYOUT_VERSION
from qe_edge.quantization.plan import make_plan, planned_forms
from qe_edge.recipes.recipe import make_recipe
from qe_edge.recipes.stored import load_checkpoint_recipe
from qe_edge.runtime.plugin_library import find_plugin_library
from qe_edge.system.errors import InputError, TargetError
from tests import fake_tensorrt
from tests.conftest import Exports
from tests.small_vlm import write_small_vlm


def has_library() -> bool:
    try:
        find_plugin_library()
    except TargetError:
        return False
    return get_target("rtx").build_problem() is None


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A library that serves; child processes find a stand-in for TensorRT."""
    fake_tensorrt.install(tmp_path, monkeypatch)
    return fake_tensorrt.library(tmp_path)


def test_a_library_that_serves(library: Path) -> None:
    assert choose_plugin(["cpu", "tensorrt"], library) == library


def test_no_target_takes_it(library: Path) -> None:
    with pytest.raises(InputError, match="'cpu' is ONNX Runtime on any CPU, which takes no TensorRT plugin"):
        choose_plugin(["cpu"], library)


@pytest.mark.parametrize(
    ("word", "problem"),
    [
        (LAYOUT_VERSION + 1, f"reads another layout of weights than {LAYOUT_VERSION}"),
        ("old", f"reads another layout of weights than {LAYOUT_VERSION}"),
        ("broken", "no such symbol"),
        ("crash", "tensorrt crashed on"),
    ],
)
def test_a_library_that_does_not_serve(library: Path, word: object, problem: str) -> None:
    with pytest.raises(TargetError, match=problem) as caught:
        choose_plugin(["tensorrt"], fake_tensorrt.library(library.parent, word))
    assert caught.value.remedy == "Build it for this machine with 'qe-edge build-plugin'."


def test_the_first_layer_that_it_refuses_is_named(library: Path) -> None:
    forms = [LayerForm("good", 64, 64), LayerForm("odd", 60, 64), LayerForm("worse", 64, 60)]
    with pytest.raises(
        TargetError, match=r"cannot run the layer 'odd': in_features is not a multiple of 8\."
    ) as caught:
        check_forms([get_target("tensorrt")], library, forms)
    assert caught.value.remedy == "Keep this layer in 16 bits."
    with pytest.raises(TargetError, match=r"layer 'odd': group_size is 32\.") as caught:
        check_forms([get_target("tensorrt")], library, [LayerForm("odd", 64, 64, group_size=32)])
    assert caught.value.remedy == "Build without --plugin."
    check_forms([get_target("cpu")], library, forms)  # which takes none


def test_a_budget_may_halve_the_groups(tmp_path: Path) -> None:
    source = write_small_vlm(tmp_path / "model")
    sizes = {}
    for budget in ({}, {"bits": 4.5}):
        recipe = make_recipe(scheme="w2a16", budget=budget)
        plan = make_plan(str(source), recipe, load_samples("demo", 1))
        sizes[bool(budget)] = {form.group_size for form in planned_forms(plan, recipe)}
    assert sizes == {False: {64}, True: {64, 32}}


@pytest.mark.parametrize(("method", "scheme"), [("qe", "w4a8"), ("rtn", "w4a16")])
def test_planned_layers_are_those_of_the_exported_graphs(
    exports: Exports, tmp_path: Path, method: str, scheme: str
) -> None:
    exported = exports(method, scheme)
    recipe = load_checkpoint_recipe(exported.checkpoint)
    plan = make_plan(str(write_small_vlm(tmp_path / "model")), recipe, load_samples("demo", 1))
    planned = {form.name: form for form in planned_forms(plan, recipe)}
    found = {
        form.name: form
        for name in ("visual", "merger", "language")
        for form in layer_forms(ir.load(exported.onnx / f"{name}.onnx"))
    }
    assert found.keys() == planned.keys()
    for name, form in found.items():
        expected = planned[name]
        assert (form.in_features, form.out_features, form.act_bits, form.group_size) == (
            expected.in_features, expected.out_features, expected.act_bits, expected.group_size,
        )  # fmt: skip
        if method == "qe":
            assert form.rank_shared == expected.rank_shared
            assert form.num_experts <= expected.num_experts


def test_a_graph_that_it_refuses_is_not_built(
    exports: Exports, library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = LayerForm("deep", 64, 64, rank_shared=129)
    monkeypatch.setattr("qe_edge.export.build.layer_forms", lambda _graph: [deep])
    monkeypatch.setattr("qe_edge.export.build.build_engine", lambda _request: pytest.fail("built"))
    with pytest.raises(TargetError, match="cannot run the layer 'deep': A rank is outside 0 to 128"):
        build_engines(exports("rtn", "w4a16").onnx, tmp_path / "out", "tensorrt", plugin_library=library)


@pytest.mark.skipif(not has_library(), reason="there is no plugin library")
def test_the_real_library() -> None:
    library = choose_plugin(["rtx"], None)
    check_forms([get_target("rtx")], library, [LayerForm("good", 64, 64, rank_shared=128, act_bits=0, group_size=64)])
    for form in (LayerForm("odd", 60, 64), LayerForm("odd", 64, 64, group_size=32)):
        with pytest.raises(TargetError, match="cannot run the layer 'odd'"):
            check_forms([get_target("rtx")], library, [form])
