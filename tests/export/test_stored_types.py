"""Weights of layers that are not quantized keep the checkpoint's type in canonical graphs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from qe_edge.export.build import build_engines
from qe_edge.export.exporter import export_model
from qe_edge.export.lowering import inline
from qe_edge.export.lowering.stored_types import WidenWeights
from qe_edge.export.lowering.tensorrt import lower_for_tensorrt
from qe_edge.export.plain_linears import PlainLinear, attach_plain_linears
from qe_edge.export.tracing import exportable, trace_graph
from qe_edge.models.family import GraphSpec, Sample
from qe_edge.models.loading import load_model
from qe_edge.runtime.engine import VisionLanguageEngine
from qe_edge.system.errors import ModelError
from tests.small_models import write_small_llama

KINDS = {torch.bfloat16: ir.DataType.BFLOAT16, torch.float16: ir.DataType.FLOAT16, torch.float32: ir.DataType.FLOAT}
LAYERS = 2 * 7 + 1  # linear layers of the small model, its head included


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_llama(tmp_path_factory.mktemp("llama") / "model", attention_bias=True)


def weights(made: Path) -> dict[str, ir.DataType | None]:
    """Types of the matrices that products read, by the names of their nodes."""
    found = {}
    for node in ir.load(made / "language.onnx").graph:
        weight = node.inputs[1] if node.op_type == "MatMul" else None
        if weight is not None and (producer := weight.producer()) is not None and producer.op_type == "Cast":
            weight = producer.inputs[0]
        if weight is not None and weight.const_value is not None and len(weight.const_value.shape) == 2:
            found[node.name or ""] = weight.dtype
    return found


@pytest.mark.parametrize("dtype", KINDS)
def test_a_graph_has_the_weights_of_its_checkpoint(folder: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    loaded = load_model(str(folder), dtype)
    before = {name: (tensor.dtype, tensor.data_ptr()) for name, tensor in loaded.model.state_dict().items()}
    export_model(loaded, tmp_path / "onnx")
    assert {name: (t.dtype, t.data_ptr()) for name, t in loaded.model.state_dict().items()} == before
    found = weights(tmp_path / "onnx")
    assert len(found) == LAYERS
    assert set(found.values()) == {KINDS[dtype]}
    build_engines(tmp_path / "onnx", tmp_path / "cpu", "cpu")
    assert set(weights(tmp_path / "cpu").values()) == {ir.DataType.FLOAT}  # read from the file as they are
    loaded.model.float()
    samples = [Sample(None, "is it red?", "no"), Sample(None, "what color is the shape?", "red")]
    for made in (tmp_path / "onnx", tmp_path / "cpu"):
        engine = VisionLanguageEngine.load(made, threads=1)
        encoded = engine.encode(samples, answers=True)
        with torch.no_grad():
            wanted = loaded.model(**loaded.family.torch_inputs(encoded)).logits.numpy()
        valid = encoded.attention_mask == 1
        assert np.abs(engine.logits(encoded)[valid] - wanted[valid]).max() < 1e-5 * np.abs(wanted).max()


class Layers(nn.Module):
    """One layer whose output it reads again, and whose weight it may use itself."""

    def __init__(self, *, directly: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.proj = nn.Linear(64, 64).bfloat16()
        self.directly = directly
        self.config = SimpleNamespace(get_text_config=lambda: None)

    def get_input_embeddings(self) -> None:
        """There are none."""

    get_output_embeddings = get_input_embeddings

    def forward(self, x: Tensor) -> Tensor:
        """Twice the layer, or the layer and its weight."""
        y: Tensor = self.proj(x)
        return y @ self.proj.weight if self.directly else self.proj(y)


def traced(module: Layers) -> ir.Model:
    spec = GraphSpec("layers", module, (torch.zeros(1, 64),), ("x",), ("y",), {"x": {}}, {})
    with exportable(module) as linears:
        model = trace_graph(spec)
        attach_plain_linears(model, linears)
    return model


def test_a_layer_that_runs_twice_has_its_weights_once() -> None:
    module = Layers(directly=False)
    model = traced(module)
    assert sorted(model.graph.initializers) == ["proj.bias", "proj.weight"]
    assert [node.op_type for node in model.graph] == ["Cast", "MatMul", "Add"] * 2
    x = torch.randn(1, 64)
    found = ort.InferenceSession(ir.to_proto(model).SerializeToString()).run(None, {"x": x.numpy()})[0]
    with torch.no_grad():
        assert (torch.from_numpy(found) - module.float()(x)).abs().max() < 1e-5


def test_a_weight_that_is_used_outside_its_layer_is_refused() -> None:
    with pytest.raises(ModelError, match="uses a weight outside its linear layer"):
        traced(Layers(directly=True))


def test_only_stored_weights_are_widened() -> None:
    """Casts of what is computed, and of weights to other types, stay."""
    text = (
        '<ir_version: 10, opset_import: ["": 21]> '
        "g (float16[2] x, float16[2] v, float16[2] w) => (float[2] y, bfloat16[2] z)"
        "{ a = Cast <to: int = 1> (x)  b = Cast <to: int = 1> (w)  y = Mul (a, b)  z = Cast <to: int = 16> (v) }"
    )
    model = ir.from_onnx_text(text)
    for number in (1.0, 3.0):
        value = model.graph.inputs.pop()
        value.const_value = ir.tensor(np.full(2, number, np.float16), name=value.name)
        model.graph.register_initializer(value)
    for node in model.graph:
        if node.op_type == "Cast":
            node.outputs[0].type = ir.TensorType(ir.DataType(node.attributes["to"].as_int()))
    assert WidenWeights()(model).modified
    assert [node.op_type for node in model.graph] == ["Cast", "Mul", "Cast"]
    widened = model.graph[1].inputs[1]
    assert widened is not None
    assert widened.const_value is not None
    assert (widened.const_value.dtype, widened.const_value.numpy().tolist()) == (ir.DataType.FLOAT, [1.0, 1.0])
    assert set(model.graph.initializers) == {widened.name, "v"}


def test_a_large_weight_is_converted_when_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """To what a small one becomes at once; what float16 cannot hold is its largest number."""
    text = '<ir_version: 10, opset_import: ["": 21, "qe_edge": 1]> g (float[1, 2, 64] x) => (float[1, 2, 32] y)'
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight[3, 5] = 7e4
    written = []
    for large in (1, 1 << 30):
        monkeypatch.setattr(inline, "LARGE", large)
        model = ir.from_onnx_text(text + '{ y = qe_edge.QELinear <layer: string = "proj"> (x) }')
        attach_plain_linears(model, {"proj": PlainLinear(weight, None)})
        assert lower_for_tensorrt(model).products == {"proj": "float16"}
        (half,) = (value.const_value for value in model.graph.initializers.values())
        assert half is not None
        assert isinstance(half, ir.LazyTensor) == (large == 1)
        written.append(half.numpy())
    assert written[0].dtype == np.float16
    assert written[0][5, 3] == np.finfo(np.float16).max
    assert np.array_equal(*written)
    assert np.abs(written[0] - weight.T.float().numpy().clip(-65504, 65504)).max() < 1e-3
