"""From kernels to time: each needs its launch, its own latency, and the slowest of the device's resources."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from qe_edge.numerics.schemes import Scheme
from qe_edge.predict.shapes import Linear, ModelShape, Stack, block_linears
from qe_edge.predict.tables import Device, device_table, instruction_table, timing_table
from qe_edge.predict.variants import WAYS, Adapters, Tables, Way, linear_kernels, linear_work
from qe_edge.predict.work import Kernel, Work

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
        bound: What most of the rest is bound by: "latency" of kernels that wait for themselves, "memory", "tensor
            cores" or "instruction issue".
        work: What is done.
    """

    milliseconds: float
    launch_milliseconds: float
    bound: str
    work: Work


def predict(request: Request) -> dict[str, dict[Way, Prediction]]:
    """All phases in all ways."""
    tables = look_up(request.device)
    steps: dict[str, Callable[[Way], Timed]] = {
        "visual": lambda way: _visual(request, way, tables),
        "prefill": lambda way: _language(request, way, tables, request.prompt, request.prompt / 2),
        "decode": lambda way: _language(request, way, tables, 1, request.context),
    }
    return {phase: {way: _timed(steps[phase](way), request, tables) for way in WAYS} for phase in PHASES}


def look_up(device: Device) -> Tables:
    """What a prediction for a device looks up."""
    return Tables(device, instruction_table(), timing_table(), device_table().other_cycles)


def weight_bytes(request: Request, way: Way) -> float:
    """About what the weights take in the device's memory: of a decoding step, but with all experts."""
    tables = look_up(request.device)
    text, vision = request.shape.text, request.shape.vision
    total = 2.0 * text.hidden * text.vocabulary
    for stack in (text, vision):
        for linear in block_linears(stack):
            once = linear_work(way, linear, 1, request.scheme, request.adapters, tables).bytes
            if way in ("naive", "plugin"):
                used = request.adapters.on(linear)
                once += (
                    used.bytes_per_value * (linear.in_features + linear.out_features) * used.routed * (used.experts - 1)
                )
            total += once * stack.layers
    return total


Timed = list[tuple[int, Kernel]]  # how many times which kernel


def _timed(kernels: Timed, request: Request, tables: Tables) -> Prediction:
    """Kernels run one after the other, so that each has its own bound."""
    spent: dict[str, float] = {}
    total, microseconds = Work(), 0.0
    launch_us = getattr(request.device.launch_us, request.launches)
    for times, kernel in kernels:
        needed = kernel.microseconds(request.device, tables.timing)
        bound = max(needed, key=lambda name: needed[name])
        own = kernel.total(request.device, tables.timing, launch_us)
        spent[bound] = spent.get(bound, 0.0) + times * (own - kernel.work.launches * launch_us)
        microseconds += times * own
        total += kernel.work * times
    return Prediction(
        microseconds / 1000, total.launches * launch_us / 1000, max(spent, key=lambda name: spent[name]), total
    )


def _blocks(stack: Stack, tokens: int, attended: float, request: Request, way: Way, tables: Tables) -> Timed:
    """All blocks of a stack; each token attends to `attended` others on average."""
    kernels = [
        (stack.layers, kernel)
        for linear in block_linears(stack)
        for kernel in linear_kernels(way, linear, tokens, request.scheme, request.adapters, tables)
    ]
    read = tokens if tokens > 1 else attended  # keys and values are read once for all tokens of a prefill
    attention = Work(
        device_table().other_launches,
        4.0 * stack.keys * read + 4.0 * tokens * stack.hidden,
        fp16_macs=2.0 * tokens * attended * stack.hidden,
    )
    return [*kernels, (stack.layers, Kernel("attention and others", attention, tables.other_cycles))]


def _visual(request: Request, way: Way, tables: Tables) -> Timed:
    shape, patches = request.shape, request.patches
    kernels = _blocks(shape.vision, patches, patches, request, way, tables)
    tokens = max(1, patches // shape.patches_per_token)
    for k, n in shape.merger:
        found = linear_kernels(way, Linear(k, (n,)), tokens, request.scheme, request.adapters, tables)
        kernels += [(1, kernel) for kernel in found]
    return kernels


def _language(request: Request, way: Way, tables: Tables, tokens: int, attended: float) -> Timed:
    text = request.shape.text
    kernels = _blocks(text, tokens, attended, request, way, tables)
    # the head stays in float16 in every way, and the exported graph gives logits of every token
    head = linear_kernels(
        "fp16", Linear(text.hidden, (text.vocabulary,)), tokens, request.scheme, request.adapters, tables
    )
    return [*kernels, *((1, kernel) for kernel in head)]
