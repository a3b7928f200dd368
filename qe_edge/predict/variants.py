"""The kernels of one linear layer, in each of the four ways that are compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qe_edge.numerics.schemes import Scheme
from qe_edge.predict.kernels import edge_llm_kernel, library_kernel, plugin_kernels
from qe_edge.predict.problem import Correction, Problem
from qe_edge.predict.shapes import Linear
from qe_edge.predict.tables import Device, InstructionTable
from qe_edge.predict.timing import Timing
from qe_edge.predict.work import Kernel, Work
from qe_edge.prepack.width import has_3_bit_kernels
from qe_edge.reconstruction.ranks import scale_rank

Way = Literal["fp16", "w4a16", "naive", "plugin"]
WAYS: tuple[Way, ...] = ("fp16", "w4a16", "naive", "plugin")
TITLES = {
    "fp16": "FP16",
    "w4a16": "W4A16, no adapters",
    "naive": "Quant Experts, separate launches",
    "plugin": "Quant Experts, plugin",
}
GROUP = 128  # group size of the W4A16 kernels that the plugin's are compared with
# launches of: quantize x, main product, shared down and up, router, expert's down and up, sum; three are the plugin's
NAIVE_EXTRA_LAUNCHES = 5
NAIVE_SUMS = 3  # times that y is written by one kernel and read by the next


@dataclass(frozen=True)
class Adapters:
    """The low-rank correction; small layers get less, as in quantization.

    Attributes:
        shared: Rank of the shared expert.
        routed: Rank of each routed expert.
        experts: Number of routed experts.
        bytes_per_value: 0.5 for INT4, 1 for int8, 2 for float16; the plugin stores what the checkpoint does.

    Example:
        >>> Adapters(shared=32, routed=32).on(Linear(256, (64,)))  # a small layer gets lower ranks
        Adapters(shared=8, routed=8, experts=8, bytes_per_value=1)
    """

    shared: int = 32
    routed: int = 32
    experts: int = 8
    bytes_per_value: float = 1

    def on(self, linear: Linear) -> Adapters:
        """Return the correction of one layer: its ranks shrink with the layer's smaller side."""
        side = min(linear.in_features, linear.out_features)
        return Adapters(
            scale_rank(self.shared, side), scale_rank(self.routed, side), self.experts, self.bytes_per_value
        )


@dataclass(frozen=True)
class Tables:
    """The tables that a prediction reads.

    Attributes:
        device: The device.
        instructions: Instruction counts of the compiled kernels.
        timing: Values fitted to measurements.
        other_cycles: Cycles assumed for a short kernel besides its launch.
    """

    device: Device
    instructions: InstructionTable
    timing: Timing
    other_cycles: float


def linear_kernels(
    way: Way, linear: Linear, tokens: int, scheme: Scheme, adapters: Adapters, tables: Tables
) -> list[Kernel]:
    """Return the kernels of one linear layer. Siblings that read one input are joined, except in the naive way.

    Example:
        >>> from qe_edge.predict.roofline import look_up
        >>> from qe_edge.predict.tables import get_device
        >>> from qe_edge.numerics.schemes import get_scheme
        >>> tables, scheme = look_up(get_device("h100")), get_scheme("w4a8")
        >>> for way in WAYS:
        ...     found = linear_kernels(way, Linear(1536, (1536,)), 1, scheme, Adapters(), tables)
        ...     print(way, [kernel.name for kernel in found])
        fp16 ['gemm']
        w4a16 ['edge decode']
        naive ['cluster', 'sums']
        plugin ['cluster']
    """
    device, table, timing = tables.device, tables.instructions, tables.timing
    if way == "fp16":
        return [library_kernel(linear, tokens, device, timing)]
    if way == "w4a16":
        return [edge_llm_kernel(linear, tokens, GROUP, device, table, timing)]
    if way == "plugin":
        return plugin_kernels(make_problem(linear, tokens, scheme, adapters), device, table, timing)
    kernels = []
    for part in linear.parts:
        one = Linear(linear.in_features, (part,))
        kernels += plugin_kernels(make_problem(one, tokens, scheme, adapters), device, table, timing)
        # y travels through memory between the terms of the sum, and x is read for each
        travel = 2.0 * tokens * (2 * NAIVE_SUMS * part + 2 * linear.in_features)
        kernels.append(Kernel("sums", Work(NAIVE_EXTRA_LAUNCHES, travel), tables.other_cycles))
    return kernels


def linear_work(way: Way, linear: Linear, tokens: int, scheme: Scheme, adapters: Adapters, tables: Tables) -> Work:
    """Return the work of one linear layer.

    Example:
        >>> from qe_edge.predict.roofline import look_up
        >>> from qe_edge.predict.tables import get_device
        >>> from qe_edge.numerics.schemes import get_scheme
        >>> tables, scheme = look_up(get_device("h100")), get_scheme("w4a8")
        >>> for way in ("fp16", "plugin"):
        ...     work = linear_work(way, Linear(1536, (1536,)), 1, scheme, Adapters(), tables)
        ...     print(f"{way}: {work.bytes / 1e6:.1f} MB")
        fp16: 4.7 MB
        plugin: 1.4 MB
    """
    return sum((kernel.work for kernel in linear_kernels(way, linear, tokens, scheme, adapters, tables)), Work())


def make_problem(linear: Linear, tokens: int, scheme: Scheme, adapters: Adapters) -> Problem:
    """Return a linear layer as the plugin gets it.

    Example:
        >>> from qe_edge.numerics.schemes import get_scheme
        >>> problem = make_problem(Linear(1536, (1536,)), 1, get_scheme("w4a8"), Adapters())
        >>> problem.variant, problem.correction
        ('s8_c', Correction(shared=32, routed=32, experts=8, bits=8))
    """
    used = adapters.on(linear)
    correction = Correction(used.shared, used.routed, used.experts, round(8 * used.bytes_per_value))
    return Problem(linear, tokens, kernel_variant(scheme), correction, _weight_bytes(linear, scheme))


def _weight_bytes(linear: Linear, scheme: Scheme) -> float:
    """Packed codes with their scales and zero points."""
    k, n = linear.in_features, linear.out_features
    grid = scheme.weight
    groups = k / grid.group_size if grid.group_size > 0 else 1
    return k * n * packed_bits(scheme) / 8 + groups * n * (2 if grid.symmetric else 3)


def packed_bits(scheme: Scheme) -> Literal[3, 4]:
    """Bits of a scheme's weights in the plugin, in a float16 model.

    Example:
        >>> from qe_edge.numerics.schemes import get_scheme
        >>> packed_bits(get_scheme("w4a8")), packed_bits(get_scheme("w3a16"))
        (4, 3)
    """
    fits = scheme.weight.bits <= 3 and has_3_bit_kernels(scheme.activation_bits, not scheme.weight.symmetric, "f16")
    return 3 if fits else 4


def kernel_variant(scheme: Scheme) -> str:
    """Return the plugin's kernel for a scheme, for example "s8_g128z", as `Variant` in plugins/host/plan.cpp does.

    Example:
        >>> from qe_edge.numerics.schemes import get_scheme
        >>> kernel_variant(get_scheme("w4a8")), kernel_variant(get_scheme("w4a16"))
        ('s8_c', 'h_g128z')
    """
    group, zeros = scheme.weight.group_size, "" if scheme.weight.symmetric else "z"
    width = "w3" if packed_bits(scheme) == 3 else ""
    if not scheme.activation_bits:
        return f"h{width}_g{128 if group >= 128 else 64}z" if group > 0 else f"h{width}_cz"
    return f"s8{width}_g{group}{zeros}" if group > 0 else f"s8{width}_c{zeros}"
