"""The operator of torch that runs the plugin's kernels: what a machine without a GPU can check of it."""

from __future__ import annotations

import re
from ctypes import Structure
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import qe_edge
from qe_edge.layers import packed_linear
from qe_edge.layers.kernel_library import ADDRESSES, COUNTED, kernel_library
from qe_edge.layers.linear import QELinear, quantized_linears
from qe_edge.layers.packed_linear import ROLES, PackedQELinear, pack_layers
from qe_edge.models.family import Sample
from qe_edge.models.quantized import load_quantized
from qe_edge.quantization.single_layer import quantize_linear
from qe_edge.recipes.recipe import make_recipe
from qe_edge.system.errors import InputError, TargetError
from tests.conftest import Exported
from tests.layers import typed_layer

ROOT = Path(__file__).parents[1]
NO_LIBRARY = "no library"  # which a CPU does not open
QUICK: dict[str, object] = {"tokens": 128, "em_steps": 1}
LAYERS: list[tuple[str, str, dict[str, object]]] = [
    ("qe", "w4a8", QUICK),
    ("qe", "w4a16", QUICK),
    ("lqer", "w4a6", {}),
    ("rtn", "w3a16", {}),
    ("rtn", "w3a8", {}),
]


def quantized(method: str, scheme: str, options: dict[str, object]) -> tuple[QELinear, Tensor]:
    weight, x = typed_layer(96, 256, 160)
    recipe = make_recipe(method=method, scheme=scheme, options=options)
    return quantize_linear(weight, x, recipe, torch.linspace(-1, 1, 96)), x[:20]


@pytest.mark.parametrize(("method", "scheme", "options"), LAYERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_packed_layer_computes_the_same(
    method: str, scheme: str, options: dict[str, object], dtype: torch.dtype
) -> None:
    layer, x = quantized(method, scheme, options)
    packed = PackedQELinear(layer, dtype, NO_LIBRARY)
    x = x.to(dtype)
    wanted, found = layer(x.float()), packed(x)
    assert (found.dtype, found.shape) == (dtype, wanted.shape)
    assert (found.float() - wanted).norm() / wanted.norm() < (2e-3 if dtype == torch.float16 else 2e-2)
    assert packed(x.float()).dtype == torch.float32
    assert packed(x[:0]).shape == (0, 96)


def test_the_library_is_given_what_its_header_declares() -> None:
    text = (ROOT / "plugins/include/qe_edge/plan.h").read_text(encoding="utf-8")
    declared = {
        struct: [
            name for line in re.findall(rf"^  {kind} ([^;]+);", body, re.MULTILINE) for name in re.findall(r"\w+", line)
        ]
        for struct, kind in (("QeProblem", "int32_t"), ("QeBuffers", "uint64_t"))
        for body in re.findall(rf"struct {struct} {{(.*?)}};", text, re.DOTALL)
    }
    assert declared == {"QeProblem": list(COUNTED), "QeBuffers": list(ADDRESSES)}


def test_the_operator_is_one_that_torch_can_rely_on() -> None:
    layer, x = quantized(*LAYERS[0])
    packed = PackedQELinear(layer, torch.float16, NO_LIBRARY)
    tensors = [getattr(packed, role) for role in ("weight", "columns", "scales", "zeros", "inv_omega", "down",
                                                  "down_scale", "up", "router", "counters")]  # fmt: skip
    arguments = (x.half(), *tensors, packed.form, packed.library)
    torch.library.opcheck(torch.ops.qe_edge.packed_linear.default, arguments)


def test_torch_compile_takes_a_layer_as_one_node() -> None:
    layer, x = quantized(*LAYERS[0])
    packed = PackedQELinear(layer, torch.float16, NO_LIBRARY)
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (20, 3):
        assert torch.equal(compiled(x[:tokens].half()), packed(x[:tokens].half()))


def test_packed_tensors_outlive_a_change_of_the_models_dtype() -> None:
    layer, x = quantized(*LAYERS[0])
    packed = PackedQELinear(layer, torch.float16, NO_LIBRARY)
    wanted = packed(x.half())
    assert torch.equal(packed.bfloat16().half()(x.half()), wanted)


def test_a_packed_model_generates_what_its_logits_say(exported: Exported, held_out: list[Sample]) -> None:
    plain, packed = load_quantized(exported.checkpoint), load_quantized(exported.checkpoint)
    assert pack_layers(packed.model, torch.float16, NO_LIBRARY) == len(quantized_linears(plain.model)) > 0
    assert not quantized_linears(packed.model)
    inputs = packed.family.torch_inputs(packed.family.encode(packed.processor, held_out[:1]))
    with torch.no_grad():
        wanted, found = (one.model.float()(**inputs).logits for one in (plain, packed))
        assert (found - wanted).norm() / wanted.norm() < 2e-2
        ids = packed.model.generate(**inputs, max_new_tokens=2, do_sample=False)  # type: ignore[operator]
    assert int(ids[0, inputs["input_ids"].shape[1]]) == int(found[0, -1].argmax())


class Recorded:
    """In place of a library: what a GPU would have been given."""

    def __init__(self, counter_bytes: int) -> None:
        self.counter_bytes = counter_bytes
        self.asked: list[int] = []
        self.runs: list[tuple[int, dict[str, int], int]] = []

    def memory(self, problem: Structure) -> tuple[int, int]:
        self.asked.append(vars_of(problem)["M"])
        return 4096, self.counter_bytes

    def run(self, problem: Structure, addresses: list[int], stream: int) -> None:
        self.runs.append((vars_of(problem)["M"], dict(zip(ADDRESSES, addresses, strict=True)), stream))


def vars_of(problem: Structure) -> dict[str, int]:
    return {name: getattr(problem, name) for name in COUNTED}


def recorded_calls(
    monkeypatch: pytest.MonkeyPatch, name: str, counter_bytes: int, inputs: list[Tensor]
) -> tuple[Recorded, PackedQELinear, list[Tensor]]:
    """What the GPU's code asks of a library, on a CPU whose torch says that it were one."""
    layer, _ = quantized(*LAYERS[0])
    packed, library = PackedQELinear(layer, torch.float16, name), Recorded(counter_bytes)
    monkeypatch.setattr(packed_linear, "kernel_library", lambda _: library)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: -1)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _: 77, raising=False)
    tensors = [getattr(packed, role) for role in (*ROLES, "counters")]
    outputs = [packed_linear._on_gpu(x, *tensors, packed.form, packed.library) for x in inputs]
    return library, packed, outputs


class Event:
    def record(self) -> None:
        """A CPU has no events."""


def test_a_gpu_is_given_every_tensor_under_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1, 2, 256).half()
    library, packed, (y,) = recorded_calls(monkeypatch, "every tensor", 4, [x])
    tokens, addresses, stream = library.runs[0]
    assert (tokens, tuple(y.shape), stream) == (2, (1, 2, 96), 77)
    own: dict[str, Any] = {role: getattr(packed, role) for role in (*ROLES, "counters")}
    wanted = {**own, "x": x, "y": y}
    assert {name: addresses[name] for name in wanted} == {
        name: 0 if tensor is None else tensor.data_ptr() for name, tensor in wanted.items()
    }
    assert addresses["workspace"]


def test_a_number_of_tokens_is_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = [torch.randn(tokens, 256).half() for tokens in (1, 3, 1, 3, 0)]
    library, _, _ = recorded_calls(monkeypatch, "asked once", 4, inputs)
    assert library.asked == [1, 3]
    assert [tokens for tokens, _, _ in library.runs] == [1, 3, 1, 3]


def test_counters_that_are_too_few_are_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    library, packed, _ = recorded_calls(monkeypatch, "too few", 1 << 20, [torch.randn(1, 256).half()])
    assert packed.counters.nbytes < library.counter_bytes
    assert library.runs[0][1]["counters"] == 0


def test_devices_that_are_not_there(exported: Exported, tmp_path: Path) -> None:
    assert quantized_linears(qe_edge.load_quantized(exported.checkpoint).model)
    with pytest.raises(InputError, match="no kernels for 'meta'"):
        qe_edge.load_quantized(exported.checkpoint, "meta")
    with pytest.raises(InputError, match="no device 'gpu'"):
        qe_edge.load_quantized(exported.checkpoint, "gpu")
    missing = f"cuda:{torch.cuda.device_count()}"
    with pytest.raises(TargetError, match=f"sees no GPU '{missing}'"):
        qe_edge.load_quantized(exported.checkpoint, missing)
    with pytest.raises(TargetError, match="cannot be loaded"):
        kernel_library(str(tmp_path / "libqe_plugin.so"))
