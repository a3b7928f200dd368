"""Predict the time of a model from its kernels: launches, latencies, and the slowest resource of the device."""

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
    """The model, the device and the sizes to predict for.

    Attributes:
        shape: The model.
        device: The device.
        scheme: Scheme of the quantized ways.
        adapters: Adapters of Quant Experts.
        patches: Patches of the picture that the visual encoder reads.
        prompt: Tokens of a prefill.
        context: Tokens in the KV cache of a decoding step.
        launches: "stream" launches kernels one by one, "graph" from a CUDA graph.
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
    """Prediction for one phase in one way.

    Attributes:
        milliseconds: Predicted time.
        launch_milliseconds: The part of it that launches take.
        bound: The resource that bounds most of the rest: "latency" (kernels that wait for themselves), "memory",
            "tensor cores" or "instruction issue".
        work: Sum of the kernels' work.
    """

    milliseconds: float
    launch_milliseconds: float
    bound: str
    work: Work


def predict(request: Request) -> dict[str, dict[Way, Prediction]]:
    """Predict all phases in all ways.

    Example:
        >>> from qe_edge.predict.shapes import find_model
        >>> from qe_edge.predict.tables import get_device
        >>> from qe_edge.numerics.schemes import get_scheme
        >>> request = Request(find_model("qwen2-vl-2b"), get_device("h100"), get_scheme("w4a8"))
        >>> phases = predict(request)
        >>> for way, found in phases["decode"].items():
        ...     print(f"{way:6} {found.milliseconds:5.2f} ms, bound by {found.bound}")
        fp16    2.24 ms, bound by memory
        w4a16   1.54 ms, bound by memory
        naive   6.15 ms, bound by memory
        plugin  1.97 ms, bound by latency
    """
    tables = look_up(request.device)
    steps: dict[str, Callable[[Way], Timed]] = {
        "visual": lambda way: _visual(request, way, tables),
        "prefill": lambda way: _language(request, way, tables, request.prompt, request.prompt / 2),
        "decode": lambda way: _language(request, way, tables, 1, request.context),
    }
    return {phase: {way: _timed(steps[phase](way), request, tables) for way in WAYS} for phase in PHASES}


def look_up(device: Device) -> Tables:
    """Return the tables for predictions for a device.

    Example:
        >>> from qe_edge.predict.tables import get_device
        >>> look_up(get_device("h100")).device.chip
        'sm_90'
    """
    return Tables(device, instruction_table(), timing_table(), device_table().other_cycles)


def weight_bytes(request: Request, way: Way) -> float:
    """Estimate the bytes of the weights in the device's memory, with all experts.

    Example:
        >>> from qe_edge.predict.shapes import find_model
        >>> from qe_edge.predict.tables import get_device
        >>> from qe_edge.numerics.schemes import get_scheme
        >>> request = Request(find_model("qwen2-vl-2b"), get_device("h100"), get_scheme("w4a8"))
        >>> [f"{way} {weight_bytes(request, way) / 1e9:.1f} GB" for way in ("fp16", "plugin")]
        ['fp16 4.3 GB', 'plugin 1.9 GB']
    """
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
