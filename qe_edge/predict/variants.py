"""What one linear layer moves, computes and launches, in each of the four ways that are compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qe_edge.predict.shapes import Linear
from qe_edge.predict.tables import InstructionTable
from qe_edge.prepack.width import has_3_bit_kernels
from qe_edge.reconstruction.ranks import scale_rank
from qe_edge.schemes import Scheme

Way = Literal["fp16", "w4a16", "naive", "plugin"]
WAYS: tuple[Way, ...] = ("fp16", "w4a16", "naive", "plugin")
TITLES = {
    "fp16": "FP16",
    "w4a16": "W4A16, no adapters",
    "naive": "Quant Experts, separate launches",
    "plugin": "Quant Experts, plugin",
}
DECODE_LIMIT = 16  # tokens up to which the plugin's decode kernel runs
GROUP = 128  # of the W4A16 kernels that ours are compared with
PLUGIN_LAUNCHES = 3
# quantize x, main product, shared down and up, router, expert's down and up, sum
NAIVE_LAUNCHES = 8
NAIVE_SUMS = 3  # times that y is written by one kernel and read by the next


@dataclass(frozen=True)
class Work:
    """What something costs, whatever the device.

    Attributes:
        launches: Kernels.
        bytes: Read and written.
        int8_macs: Multiply-accumulates on int8 tensor cores.
        fp16_macs: The same in float16.
        instructions: Warp instructions; 0 where they were not counted.
    """

    launches: float = 0
    bytes: float = 0
    int8_macs: float = 0
    fp16_macs: float = 0
    instructions: float = 0

    def __add__(self, other: Work) -> Work:
        return Work(*(mine + its for mine, its in zip(self._values(), other._values(), strict=True)))

    def __mul__(self, times: float) -> Work:
        return Work(*(times * value for value in self._values()))

    def _values(self) -> tuple[float, ...]:
        return self.launches, self.bytes, self.int8_macs, self.fp16_macs, self.instructions


@dataclass(frozen=True)
class Adapters:
    """The low-rank correction; small layers get less, as in quantization.

    Attributes:
        shared: Rank of the shared expert.
        routed: Rank of each routed expert.
        experts: Number of routed experts.
        bytes_per_value: 0.5 for INT4, 1 for int8, 2 for float16; the plugin stores what the checkpoint does.
    """

    shared: int = 32
    routed: int = 32
    experts: int = 8
    bytes_per_value: float = 1

    def on(self, linear: Linear) -> Adapters:
        """What is left of it on one layer."""
        side = min(linear.in_features, linear.out_features)
        return Adapters(
            scale_rank(self.shared, side), scale_rank(self.routed, side), self.experts, self.bytes_per_value
        )


def linear_work(
    way: Way, linear: Linear, tokens: int, scheme: Scheme, adapters: Adapters, table: InstructionTable, chip: str
) -> Work:
    """Work of one linear layer; siblings that read one input are joined, except in the naive way."""
    if way == "naive":
        parts = [Linear(linear.in_features, (part,)) for part in linear.parts]
        total = Work()
        for part in parts:
            total += _naive(part, tokens, scheme, adapters, table, chip)
        return total
    if way == "plugin":
        return _plugin(linear, tokens, scheme, adapters, table, chip)
    k, n = linear.in_features, linear.out_features
    macs, moved = float(tokens * k * n), 2.0 * tokens * (k + n)
    if way == "fp16":
        return Work(1, 2.0 * k * n + moved, fp16_macs=macs)
    per_kib = table.edge_llm.decode(tokens)
    issued = macs / 1000 * table.edge_llm.prefill_per_1000_mac if per_kib is None else per_kib * k * n / 2 / 1024
    return Work(1, k * n / 2 + 2.0 * k * n / GROUP + moved, fp16_macs=macs, instructions=issued)


def _plugin(
    linear: Linear, tokens: int, scheme: Scheme, adapters: Adapters, table: InstructionTable, chip: str
) -> Work:
    k, n = linear.in_features, linear.out_features
    used = adapters.on(linear)
    rank, touched = used.shared + used.routed, min(used.experts, tokens)
    codes = tokens * k * (1 if scheme.activation_bits else 2)  # written by `prepare`, read by the product
    stored = used.shared + used.routed * touched
    factors = used.bytes_per_value * (k + n) * stored + 2.0 * used.experts * k
    hidden = 2.0 * tokens * rank
    moved = 2.0 * tokens * (2 * k + n) + 2 * codes + 2 * hidden
    return Work(
        PLUGIN_LAUNCHES,
        _weight_bytes(linear, scheme) + factors + moved,
        fp16_macs=float(tokens) * (rank * (k + n) + used.experts * k),
        instructions=_issued(linear, tokens, scheme, table, chip),
    ) + _main(linear, tokens, scheme)


def _naive(linear: Linear, tokens: int, scheme: Scheme, adapters: Adapters, table: InstructionTable, chip: str) -> Work:
    """The same arithmetic, with y travelling through memory between the terms of the sum, and x read for each."""
    joined = _plugin(linear, tokens, scheme, adapters, table, chip)
    travel = 2.0 * tokens * (2 * NAIVE_SUMS * linear.out_features + 2 * linear.in_features)
    return joined + Work(NAIVE_LAUNCHES - PLUGIN_LAUNCHES, travel)


def _main(linear: Linear, tokens: int, scheme: Scheme) -> Work:
    macs = float(tokens * linear.in_features * linear.out_features)
    return Work(int8_macs=macs) if scheme.activation_bits else Work(fp16_macs=macs)


def _weight_bytes(linear: Linear, scheme: Scheme) -> float:
    """Packed codes with their scales and zero points."""
    k, n = linear.in_features, linear.out_features
    grid = scheme.weight
    groups = k / grid.group_size if grid.group_size > 0 else 1
    return k * n * packed_bits(scheme) / 8 + groups * n * (2 if grid.symmetric else 3)


def _issued(linear: Linear, tokens: int, scheme: Scheme, table: InstructionTable, chip: str) -> float:
    """Warp instructions of the main product's loop, from the compiled code."""
    k, n = linear.in_features, linear.out_features
    kind = kernel_variant(scheme)
    if tokens > DECODE_LIMIT:
        return tokens * k * n / 1000 * table.prefill_per_1000_mac[chip][kind]
    return k * n / 2048 * table.decode_per_kib[chip][f"{kind}_t{8 if tokens <= 8 else 16}"]


def packed_bits(scheme: Scheme) -> Literal[3, 4]:
    """Bits of a scheme's weights in the plugin, in a float16 model."""
    fits = scheme.weight.bits <= 3 and has_3_bit_kernels(scheme.activation_bits, not scheme.weight.symmetric, "f16")
    return 3 if fits else 4


def kernel_variant(scheme: Scheme) -> str:
    """The plugin's kernel for a scheme, for example "s8_g128z"; `Variant` in plugins/host/plan.cpp."""
    group, zeros = scheme.weight.group_size, "" if scheme.weight.symmetric else "z"
    width = "w3" if packed_bits(scheme) == 3 else ""
    if not scheme.activation_bits:
        return f"h{width}_g{128 if group >= 128 else 64}z" if group > 0 else f"h{width}_cz"
    return f"s8{width}_g{group}{zeros}" if group > 0 else f"s8{width}_c{zeros}"
