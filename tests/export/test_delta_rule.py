"""The gated delta rule in chunks equals ONNX Runtime's own node, and states stay in float32 in a graph of float16."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx_ir.passes import PassResult, PostconditionError, PreconditionError

from qe_edge.export import engine_child
from qe_edge.export.build import build_engines
from qe_edge.export.engine import EngineRequest, build_engine
from qe_edge.export.exporter import export_model
from qe_edge.export.lowering.cuda import lower_for_cuda
from qe_edge.export.lowering.delta_rule import CHUNK, ExpandDeltaRule, expand_delta_rule
from qe_edge.export.lowering.tensorrt import lower_for_tensorrt
from qe_edge.models.quantized import save_quantized
from qe_edge.quantization.quantizer import quantize
from qe_edge.recipes.recipe import make_recipe
from qe_edge.runtime.engine_info import read_engine_info
from qe_edge.runtime.limits import EngineLimits, limits_of, with_capacity, with_limits
from qe_edge.runtime.manifest import read_manifest
from tests.models import minicpmv4_6_models, test_lfm2_vl
from tests.models.families import SAMPLES
from tests.models.test_decoders import SIZES, TEXTS, export_of, write

needs_rtx = pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed")
HEADS, KEY, VALUE = 3, 16, 24
WIDTHS = {"q": HEADS * KEY, "k": HEADS * KEY, "v": HEADS * VALUE, "g": HEADS, "b": HEADS}
COUNTS = (1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 5 * CHUNK + 3, 1000)
HALF, SINGLE = ir.DataType.FLOAT16, ir.DataType.FLOAT


def rule_graph(heads: int = HEADS, key: int = KEY, value: int = VALUE) -> ir.Model:
    widths = {"q": heads * key, "k": heads * key, "v": heads * value, "g": heads, "b": heads}
    given = ", ".join(f'float["batch", "tokens", {width}] {name}' for name, width in widths.items())
    state = f'float["batch", {heads}, {key}, {value}]'
    numbers = f'q_num_heads: int = {heads}, kv_num_heads: int = {heads}, update_rule: string = "gated_delta"'
    node = f"y, n = com.microsoft.LinearAttention <{numbers}, scale: float = 0.3> (q, k, v, s, g, b)"
    results = f'float["batch", "tokens", {heads * value}] y, {state} n'
    head = '<ir_version: 10, opset_import: ["": 21, "com.microsoft": 1]>'
    model = ir.from_onnx_text(f"{head} g ({given}, {state} s) => ({results}) {{ {node} }}")
    model.graph.node(0).name = "rule"
    return model


def session(model: ir.Model) -> ort.InferenceSession:
    return ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])


def feeds_of(kind: str, tokens: int) -> dict[str, np.ndarray]:
    """Two rows of tokens; queries and keys have the length 1."""
    generator = np.random.default_rng(tokens)
    feeds = {name: generator.normal(size=(2, tokens, width)) for name, width in WIDTHS.items()}
    for name in ("q", "k"):
        heads = feeds[name].reshape(2, tokens, HEADS, KEY)
        feeds[name] = (heads / np.linalg.norm(heads, axis=-1, keepdims=True)).reshape(2, tokens, -1)
    feeds["g"], feeds["b"] = -np.abs(feeds["g"]) / 10, generator.uniform(size=feeds["b"].shape)
    if kind == "equal keys":
        feeds["k"][:] = feeds["k"][:, :1]
        feeds["g"], feeds["b"] = feeds["g"] / 100, np.ones_like(feeds["b"])
    if kind == "strong decays":
        feeds["g"] *= 1000
    if kind == "weak and strong decays":
        feeds["g"] = np.where(generator.uniform(size=feeds["g"].shape) < 0.3, -80, -1e-3)
    feeds["s"] = generator.normal(size=(2, HEADS, KEY, VALUE))
    return {name: np.ascontiguousarray(array, np.float32) for name, array in feeds.items()}


def apart(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


@pytest.fixture(scope="module")
def rules() -> tuple[ort.InferenceSession, ort.InferenceSession]:
    """ONNX Runtime's node, and the chunks."""
    lowered = rule_graph()
    expand_delta_rule(lowered)
    assert not lowered.functions
    return session(rule_graph()), session(lowered)


@pytest.mark.parametrize("kind", ["any", "equal keys", "strong decays", "weak and strong decays"])
def test_chunks_equal_tokens(rules: tuple[ort.InferenceSession, ort.InferenceSession], kind: str) -> None:
    for tokens in COUNTS:
        feeds = feeds_of(kind, tokens)
        for wanted, found in zip(*(each.run(None, feeds) for each in rules), strict=True):
            assert np.isfinite(found).all()
            assert apart(found, wanted) < 5e-6, tokens


@pytest.mark.parametrize("tokens", [3, CHUNK, CHUNK + 5, 3 * CHUNK])
def test_padding_changes_nothing(rules: tuple[ort.InferenceSession, ort.InferenceSession], tokens: int) -> None:
    """Tokens of a row beyond its own have neither decay nor beta, whatever else they are."""
    feeds = feeds_of("any", 4 * CHUNK)
    for name in ("g", "b"):
        feeds[name][:, tokens:] = 0
    own = {name: array if name == "s" else array[:, :tokens] for name, array in feeds.items()}
    mixed, present = rules[1].run(None, feeds)
    wanted, kept = rules[1].run(None, own)
    assert apart(mixed[:, :tokens], wanted) < 1e-6
    assert apart(present, kept) < 1e-6


def test_calls_go_on_where_others_ended(rules: tuple[ort.InferenceSession, ort.InferenceSession]) -> None:
    feeds, parts, start = feeds_of("any", 70), [], 0
    wanted, last = rules[1].run(None, feeds)
    state = feeds["s"]
    for count in (20, 1, 1, 33, 15):
        piece = {name: array[:, start : start + count] for name, array in feeds.items()} | {"s": state}
        mixed, state = rules[1].run(None, piece)
        parts.append(mixed)
        start += count
    assert apart(np.concatenate(parts, 1), wanted) < 1e-6
    assert apart(state, last) < 1e-6


def test_contracts_of_the_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model = rule_graph()
    past = model.graph.inputs[5]
    past.shape = ir.Shape(["batch", HEADS, "width", VALUE])
    with pytest.raises(PreconditionError, match="The matrices of 'rule' have known sizes"):
        expand_delta_rule(model)
    monkeypatch.setattr(ExpandDeltaRule, "call", lambda _self, model: PassResult(model, modified=False))
    with pytest.raises(PostconditionError, match="No LinearAttention is left"):
        expand_delta_rule(rule_graph())


@pytest.fixture(scope="module", params=["lfm2", "qwen3.5"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_of(request.param, tmp_path_factory.mktemp("export"))


def before_state(graph: ir.Graph) -> Iterator[ir.Node]:
    """Every node from the states that leave a graph back to products with weights, which are in float16."""
    pending = [value.producer() for value in graph.outputs if not (value.name or "").endswith(("key", "value", "gits"))]
    seen: set[ir.Node] = set()
    while pending:
        node = pending.pop()
        if node is None or node in seen or _multiplies_weights(node):
            continue
        seen.add(node)
        yield node
        pending += [value.producer() for value in node.inputs if value is not None]


def _multiplies_weights(node: ir.Node) -> bool:
    weight = node.inputs[1] if node.op_type == "MatMul" else None
    producer = None if weight is None else weight.producer()
    return weight is not None and (producer is None or producer.op_type == "DequantizeLinear")


@pytest.mark.parametrize("lower", [lower_for_tensorrt, lambda model: lower_for_cuda(model, plugin=False)])
def test_a_state_and_all_that_makes_it_are_float32(folder: Path, lower: Callable[[ir.Model], object]) -> None:
    model = ir.load(folder / "onnx" / "language.onnx")
    lower(model)
    for value in (*model.graph.inputs, *model.graph.outputs):
        if (value.name or "").startswith(("past_key_values.", "present.")):
            assert value.dtype == (HALF if (value.name or "").endswith(("key", "value")) else SINGLE), value.name
    nodes = list(before_state(model.graph))
    assert {"Concat", "GatherElements"} <= {node.op_type for node in nodes}
    assert all(value.dtype != HALF for node in nodes for value in node.outputs), [node.op_type for node in nodes]
    assert all(node.op_type != "Cast" or node.attributes["to"].as_int() != HALF for node in nodes)
    casts = [node for node in nodes if node.op_type == "Cast" and node.inputs[0].dtype == HALF]  # type: ignore[union-attr]
    assert casts
    assert all(_multiplies_weights(node.inputs[0].producer()) for node in casts)  # type: ignore[union-attr, arg-type]
    assert all(node.inputs[0].dtype == SINGLE for node in model.graph if node.op_type == "Conv")  # type: ignore[union-attr]
    bodies = [node.attributes["body"].as_graph() for node in nodes if node.op_type == "Scan"]
    assert all(inner.op_type != "Cast" for body in bodies for inner in body)
    kinds = {node.op_type for node in model.graph}
    rule = any("recurrent" in (value.name or "") for value in model.graph.inputs)
    assert ("Scan" in kinds or "LinearAttention" in kinds) == rule


def test_limits_leave_states_as_they_are(folder: Path) -> None:
    manifest = read_manifest(folder / "onnx")
    states = [spec.name for spec in manifest.cache if not spec.name.endswith(("key", "value"))]
    wanted = with_capacity(with_limits(manifest, EngineLimits(batch=2, context=64, prompt=32)), 64)
    assert limits_of(wanted).context == 64
    for name, shapes in wanted.graphs["language"].profiles.items():
        for state in states:
            before = manifest.graphs["language"].profiles[name][state]
            assert shapes[state] == (before[0], before[1], (2, *before[2][1:]))


def test_float32_is_no_tf32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT rounds float32 to the ten bits of TF32 unless it is told not to."""
    cleared: list[str] = []
    config = SimpleNamespace(clear_flag=cleared.append, add_optimization_profile=lambda _: 0)
    builder = SimpleNamespace(
        create_network=lambda _flags: None,
        create_builder_config=lambda: config,
        build_serialized_network=lambda *_: None,
    )

    class ILogger:
        pass

    library = SimpleNamespace(
        ILogger=ILogger,
        Builder=lambda _: builder,
        OnnxParser=lambda *_: SimpleNamespace(parse_from_file=lambda _: True),
        NetworkDefinitionCreationFlag=SimpleNamespace(),
        BuilderFlag=SimpleNamespace(TF32="TF32"),
        __version__="10.7",
    )
    monkeypatch.setattr(engine_child.importlib, "import_module", lambda _: library)
    files = (tmp_path / "a.onnx", tmp_path / "a.engine", tmp_path / "facts.json")
    assert engine_child.build(EngineRequest("tensorrt", *files, profiles={})).errors == ["no engine was built"]
    assert cleared == ["TF32"]


@needs_rtx
def test_tensorrt_takes_the_rule(tmp_path: Path) -> None:
    """Any number of tokens, and one; heads as Qwen3.5 has them."""
    model = rule_graph(16, 128, 128)
    expand_delta_rule(model)
    ir.save(model, tmp_path / "rule.onnx")
    widths, sizes = {"q": 2048, "k": 2048, "v": 2048, "g": 16, "b": 16}, {"prompt": (1, 512, 4096), "step": (1, 1, 1)}
    profiles = {
        name: {
            **{key: tuple((rows, count, width) for rows, count in zip((1, 1, 4), counts, strict=True))
               for key, width in widths.items()},
            "s": tuple((rows, 16, 128, 128) for rows in (1, 1, 4)),
        }
        for name, counts in sizes.items()
    }  # fmt: skip
    request = EngineRequest(
        backend="tensorrt_rtx",
        onnx=tmp_path / "rule.onnx",
        engine=tmp_path / "rule.engine",
        facts=tmp_path / "facts.json",
        profiles=profiles,  # type: ignore[arg-type] # three of three
        capabilities=((8, 6),),
    )
    facts = build_engine(request)
    assert facts.errors == []
    assert facts.size > 0


REAL = {**SIZES, "hidden_size": 1024, "intermediate_size": 512, "num_hidden_layers": 2}
QWEN = {
    "num_attention_heads": 8,
    "head_dim": 256,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "mrope_section": [11, 11, 10],
                        "partial_rotary_factor": 0.25},
}  # fmt: skip
LFM = {
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "layer_types": ["conv", "full_attention"],
    "block_auto_adjust_ff_dim": False,
}


@needs_rtx
@pytest.mark.slow
@pytest.mark.parametrize("name", ["lfm2", "qwen3_5_text", "lfm2_vl", "minicpmv4_6"])
def test_engines_with_states_are_built(name: str, tmp_path: Path) -> None:
    """Language models with the heads of real ones; models with pictures as their families' tests have them."""
    if name in ("lfm2", "qwen3_5_text"):
        source = write(tmp_path / "model", name, **{**REAL, **(LFM if name == "lfm2" else QWEN)})
        modules, samples = ("language",), TEXTS
    else:
        source = (test_lfm2_vl if name == "lfm2_vl" else minicpmv4_6_models).write(tmp_path / "model")
        modules, samples = ("language", "visual", "merger"), SAMPLES[:2]
    recipe = make_recipe(method="rtn", scheme="w4a8", modules=modules)
    save_quantized(*quantize(str(source), recipe, samples), tmp_path / "checkpoint")
    export_model(tmp_path / "checkpoint", tmp_path / "onnx")
    folder = build_engines(tmp_path / "onnx", tmp_path / "rtx", "rtx", limits=EngineLimits(batch=1))
    info, manifest = read_engine_info(folder), read_manifest(folder)
    assert info is not None
    assert info.graphs.keys() == manifest.graphs.keys()
    states = [spec for spec in manifest.cache if not spec.name.endswith(("key", "value"))]
    assert states
    assert {spec.dtype for spec in states} == {"float32"}
