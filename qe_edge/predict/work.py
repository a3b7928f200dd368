"""What a kernel does, and how long that takes: its launch, a fixed time, and then what the slowest resource needs."""

from __future__ import annotations

from dataclasses import dataclass, field

from qe_edge.predict.tables import Device, Timing

BLEND = 3  # exponent with which resources of about the same time are joined


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
class Kernel:
    """One launch.

    Attributes:
        name: What it does.
        work: What it costs, whatever the device.
        fixed: Cycles before and after its loops.
        latency: Cycles of one block after the other on a multiprocessor, each waiting for itself.
        busy: Cycles of a multiprocessor that has as many blocks as it takes, for its share of all blocks.
        library: Whether it uses the fastest tensor instructions of the device, as a vendor's library does.
        waste: What the tensor cores multiply relative to the work.
        blocks: Size of the grid.
        overlaps: Whether it may start before the launch in front ends, on chips that can.
    """

    name: str
    work: Work = field(default_factory=lambda: Work(1))
    fixed: float = 0
    latency: float = 0
    busy: float = 0
    library: bool = False
    waste: float = 1
    blocks: int = 1
    overlaps: bool = False

    def microseconds(self, device: Device, timing: Timing) -> dict[str, float]:
        """Time that each resource needs, and what none of them explains under "launch latency"."""
        cycle = 1 / (device.clock_ghz * 1000)
        fp16_macs = device.library_fp16_macs if self.library and device.library_fp16_macs else device.fp16_macs
        int8 = self.work.int8_macs / device.per_second(device.int8_macs)
        fp16 = self.work.fp16_macs / device.per_second(fp16_macs)
        return {
            "latency": self.latency * cycle,
            "memory": self.work.bytes / (device.bandwidth_gbs * 1000 * timing.bandwidth),
            "tensor cores": 1e6 * self.waste * (int8 + fp16) / timing.tensor,
            "instruction issue": self.busy * cycle,
        }

    def total(self, device: Device, timing: Timing, launch_us: float) -> float:
        """Microseconds of the kernel with its launches."""
        needed = self.microseconds(device, timing).values()
        fixed = self.work.launches * self.fixed / (device.clock_ghz * 1000)
        joined: float = sum(value**BLEND for value in needed) ** (1 / BLEND)
        if self.overlaps and device.from_sm_90:
            launch_us *= timing.overlapped_launch
        return self.work.launches * launch_us + fixed + joined


def join(*values: float) -> float:
    """One time of what runs at once: about the longest; near a tie both count."""
    joined: float = sum(value**BLEND for value in values) ** (1 / BLEND)
    return joined
