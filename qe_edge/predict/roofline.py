"""From work to time: the slowest of memory, tensor cores and instruction issue, plus launches. Never measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from qe_edge.predict.shapes import Linear, ModelShape, Stack, block_linears
from qe_edge.predict.tables import Device, DeviceTable, Efficiency, InstructionTable, device_table, instruction_table
from qe_edge.predict.variants import WAYS, Adapters, Way, Work, linear_work
from qe_edge.schemes import Scheme

Launches = Literal["stream", "graph"]
PHASES = ("visual", "prefill", "decode")


@dataclass(frozen=True)
class Request:
    """What to predict.

    Attributes:
        shape: The model.
        device: The device.
        scheme: Of the quantized ways.
        adapters: Of Quant Experts.
        patches: Of the picture that the visual encoder reads.
        prompt: Tokens of a prefill.
        context: Tokens in the KV cache of a decoding step.
        launches: Kernels launched one by one, or from a CUDA graph.
    """

    shape: ModelShape
    device: Device
    scheme: Scheme
    adapters: Adapters = field(default_factory=Adapters)
    patches: int = 1024
    prompt: int = 1024
    context: int = 1024
    launches: Launches = "stream"


@dataclass(frozen=True)
class Prediction:
    """One phase in one way.

    Attributes:
        milliseconds: Predicted time.
        launch_milliseconds: The part of it that launches take.
        bound: What most of the rest is spent on: "memory", "tensor cores" or "instruction issue".
        work: What is done.
    """

    milliseconds: float
    launch_milliseconds: float
    bound: str
    work: Work


def predict(request: Request) -> dict[str, dict[Way, Prediction]]:
    """All phases in all ways."""
    devices, table = device_table(), instruction_table()
    steps: dict[str, Callable[[Way], list[Work]]] = {
        "visual": lambda way: _visual(request, way, table, devices),
        "prefill": lambda way: _language(request, way, table, devices, request.prompt, request.prompt / 2),
        "decode": lambda way: _language(request, way, table, devices, 1, request.context),
    }
    return {phase: {way: _timed(steps[phase](way), request, devices) for way in WAYS} for phase in PHASES}


def weight_bytes(request: Request, way: Way) -> float:
    """About what the weights take in the device's memory: of a decoding step, but with all experts."""
    table = instruction_table()
    text, vision = request.shape.text, request.shape.vision
    total = 2.0 * text.hidden * text.vocabulary
    for stack in (text, vision):
        for linear in block_linears(stack):
            once = linear_work(way, linear, 1, request.scheme, request.adapters, table, request.device.chip).bytes
            if way in ("naive", "plugin"):
                used = request.adapters.on(linear)
                once += (
                    used.bytes_per_value * (linear.in_features + linear.out_features) * used.routed * (used.experts - 1)
                )
            total += once * stack.layers
    return total


def seconds(work: Work, device: Device, efficiency: Efficiency, issue_rate: float) -> dict[str, float]:
    """Time that each resource needs for some work."""
    int8 = work.int8_macs / device.per_second(device.int8_macs)
    fp16 = work.fp16_macs / device.per_second(device.fp16_macs)
    return {
        "memory": work.bytes / (device.bandwidth_gbs * 1e9 * efficiency.bandwidth),
        "tensor cores": (int8 + fp16) / efficiency.tensor,
        "instruction issue": work.instructions / (device.per_second(issue_rate) * efficiency.issue),
    }


def _timed(works: list[Work], request: Request, devices: DeviceTable) -> Prediction:
    """Kernels run one after the other, so that each has its own bound."""
    spent: dict[str, float] = {}
    total = Work()
    for work in works:
        needed = seconds(work, request.device, devices.efficiency, devices.warp_instructions_per_cycle)
        bound = max(needed, key=lambda name: needed[name])
        spent[bound] = spent.get(bound, 0.0) + needed[bound]
        total += work
    launch = total.launches * getattr(request.device.launch_us, request.launches) / 1000
    busiest = max(spent, key=lambda name: spent[name])
    return Prediction(1000 * sum(spent.values()) + launch, launch, busiest, total)


def _blocks(
    stack: Stack, tokens: int, attended: float, request: Request, way: Way, table: InstructionTable, others: int
) -> list[Work]:
    """All blocks of a stack; each token attends to `attended` others on average."""
    linears = [
        linear_work(way, linear, tokens, request.scheme, request.adapters, table, request.device.chip) * stack.layers
        for linear in block_linears(stack)
    ]
    read = tokens if tokens > 1 else attended  # keys and values are read once for all tokens of a prefill
    attention = Work(
        others, 4.0 * stack.keys * read + 4.0 * tokens * stack.hidden, fp16_macs=2.0 * tokens * attended * stack.hidden
    )
    return [*linears, attention * stack.layers]


def _visual(request: Request, way: Way, table: InstructionTable, devices: DeviceTable) -> list[Work]:
    shape, patches = request.shape, request.patches
    works = _blocks(shape.vision, patches, patches, request, way, table, devices.other_launches)
    tokens = max(1, patches // shape.patches_per_token)
    for k, n in shape.merger:
        works.append(
            linear_work(way, Linear(k, (n,)), tokens, request.scheme, request.adapters, table, request.device.chip)
        )
    return works


def _language(
    request: Request, way: Way, table: InstructionTable, devices: DeviceTable, tokens: int, attended: float
) -> list[Work]:
    text = request.shape.text
    works = _blocks(text, tokens, attended, request, way, table, devices.other_launches)
    # the head stays in float16 in every way, and the exported graph gives logits of every token
    head = linear_work(
        "fp16", Linear(text.hidden, (text.vocabulary,)), tokens, request.scheme, request.adapters, table, ""
    )
    return [*works, head]
