"""The data files: devices, the paper's models, instruction counts of the compiled kernels, and fitted timing."""

from __future__ import annotations

from functools import lru_cache
from importlib.resources import files
from typing import Any

import yaml
from pydantic import Field

from qe_edge.predict.timing import StrictTable, Timing
from qe_edge.system.errors import UnknownNameError


class LaunchTime(StrictTable):
    """Microseconds from one kernel to the next.

    Attributes:
        stream: Time if kernels are launched one by one.
        graph: Time in a CUDA graph.
    """

    stream: float = Field(gt=0)
    graph: float = Field(gt=0)


class Device(StrictTable):
    """One row of devices.yaml, which explains the figures."""

    title: str
    chip: str
    multiprocessors: int = Field(gt=0)
    clock_ghz: float = Field(gt=0)
    bandwidth_gbs: float = Field(gt=0)
    memory_gib: float = Field(gt=0)
    int8_macs: int = Field(gt=0)
    fp16_macs: int = Field(gt=0)
    library_fp16_macs: int | None = Field(None, gt=0)
    launch_us: LaunchTime
    measured: bool = False
    clusters: bool = True
    source: str

    @property
    def from_sm_90(self) -> bool:
        """Whether launches overlap and blocks may form clusters, as from compute capability 9.0 on."""
        return int(self.chip.removeprefix("sm_")) >= 90

    def per_second(self, per_cycle: float) -> float:
        """Rate of the whole GPU per second, given the rate of one multiprocessor per cycle."""
        return per_cycle * self.multiprocessors * self.clock_ghz * 1e9


class DeviceTable(StrictTable):
    """The content of devices.yaml."""

    devices: dict[str, Device]
    warp_instructions_per_cycle: float = Field(gt=0)
    other_launches: int = Field(ge=0)
    other_cycles: float = Field(ge=0)


class Accuracy(StrictTable):
    """The content of accuracy.json, written by benchmarks/predict_error.py: errors of the predictions.

    Attributes:
        device: Title of the device.
        rows: Number of measured rows that were not used for the fit.
        median: Median of the factor between prediction and measurement, at least 1.
        nine_of_ten: 90th percentile of this factor.
        worst_step: The largest factor of a whole step.
    """

    device: str
    rows: int
    median: float
    nine_of_ten: float
    worst_step: float


class EdgeLLM(StrictTable):
    """Instructions of one warp in TensorRT Edge-LLM's W4A16 kernels, counted in the disassembly."""

    version: str
    chip: str
    prefill_per_1000_mac: float = Field(gt=0)
    decode_per_kib: dict[int, float]

    def decode(self, tokens: int) -> float | None:
        """Instructions per KiB of weights of the decode kernel, None where it is not used."""
        return next((cost for limit, cost in sorted(self.decode_per_kib.items()) if tokens <= limit), None)


class InstructionTable(StrictTable):
    """The content of instructions.json, written by benchmarks/kernel_static.py: warp instructions in the loop over K.

    Attributes:
        prefill_per_1000_mac: Instructions per 1000 multiply-accumulates, by chip and kernel variant.
        decode_per_kib: Instructions per 2048 weights (a KiB of 4-bit weights), by chip and kernel variant. The ending
            t8 or t16 of a variant is its largest number of tokens; the ending cluster names the cluster launch.
        edge_llm: The same for the kernels of TensorRT Edge-LLM.
    """

    prefill_per_1000_mac: dict[str, dict[str, float]]
    decode_per_kib: dict[str, dict[str, float]]
    edge_llm: EdgeLLM


@lru_cache(maxsize=1)
def device_table() -> DeviceTable:
    """Return all devices, and the assumptions that hold for each of them.

    Example:
        >>> sorted(device_table().devices)[:3]
        ['h100', 'orin-agx', 'orin-nano']
    """
    return DeviceTable.model_validate(yaml.safe_load(_text("devices.yaml")))


@lru_cache(maxsize=1)
def timing_table() -> Timing:
    """Return the fitted timing of the kernels.

    Example:
        >>> 0 < timing_table().bandwidth <= 1  # share of the memory's peak that kernels reach
        True
    """
    return Timing.model_validate(yaml.safe_load(_text("timing.yaml")))


@lru_cache(maxsize=1)
def accuracy() -> Accuracy:
    """Return the errors of the predictions.

    Example:
        >>> accuracy().median < 1.2  # half of the predictions are off by less than 20 %
        True
    """
    return Accuracy.model_validate_json(_text("accuracy.json"))


@lru_cache(maxsize=1)
def instruction_table() -> InstructionTable:
    """Return the instruction counts of the compiled kernels.

    Example:
        >>> instruction_table().decode_per_kib["sm_90"]["s8_g128z_cluster"] > 0
        True
    """
    return InstructionTable.model_validate_json(_text("instructions.json"))


@lru_cache(maxsize=1)
def model_table() -> dict[str, Any]:
    """Return the sizes of the paper's models, for `qe_edge.predict.shapes`.

    Example:
        >>> sorted(model_table())
        ['internvl2-2b', 'internvl2-8b', 'qwen2-vl-2b', 'qwen2-vl-72b', 'qwen2-vl-7b']
    """
    return dict(yaml.safe_load(_text("models.yaml")))


def get_device(name: str) -> Device:
    """Look up a device.

    Raises:
        UnknownNameError: If there is none of that name. The message lists all devices.

    Example:
        >>> device = get_device("h100")
        >>> device.title, device.multiprocessors
        ('H100 SXM 80 GB', 132)
    """
    devices = device_table().devices
    if name not in devices:
        raise UnknownNameError("device", name, devices)
    return devices[name]


def _text(name: str) -> str:
    return files("qe_edge.predict").joinpath(name).read_text(encoding="utf-8")
