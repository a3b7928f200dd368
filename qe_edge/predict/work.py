"""The work of a kernel and its time: the launch, a fixed time, and the time of the slowest resource."""

from __future__ import annotations

from dataclasses import dataclass, field

from qe_edge.predict.tables import Device
from qe_edge.predict.timing import Timing

BLEND = 3  # exponent with which resources of about the same time are joined


@dataclass(frozen=True)
class Work:
    """Cost of a computation, independent of the device.

    Attributes:
        launches: Number of kernels.
        bytes: Bytes read and written.
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
        name: Its name.
        work: Its cost, independent of the device.
        fixed: Cycles before and after its loops.
        latency: Cycles of the blocks of one multiprocessor if they run one after the other.
        busy: Cycles of a multiprocessor for its share of the blocks if it is full of blocks.
        library: Whether it uses the fastest tensor instructions of the device, as a vendor's library does.
        waste: Multiplications of the tensor cores relative to the work.
        blocks: Size of the grid.
        overlaps: Whether it may start before the previous launch ends, on GPUs that can do this.

    Example:
        >>> from qe_edge.predict.tables import get_device, timing_table
        >>> device, timing = get_device("h100"), timing_table()
        >>> kernel = Kernel("copy", Work(launches=1, bytes=100e6))
        >>> f"{kernel.microseconds(device, timing)['memory']:.0f} us in memory"
        '34 us in memory'
        >>> f"{kernel.total(device, timing, launch_us=2):.0f} us in all"
        '36 us in all'
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
        """Time that each resource needs."""
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
    """Combine the times of what runs at once: about the longest; near a tie both count.

    Example:
        >>> join(10, 1), join(10, 10)
        (10.003332222839093, 12.59921049894873)
    """
    joined: float = sum(value**BLEND for value in values) ** (1 / BLEND)
    return joined
