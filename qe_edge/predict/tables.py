"""The data files: devices, the paper's models, and instruction counts of the compiled kernels."""

from __future__ import annotations

from functools import lru_cache
from importlib.resources import files
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field

from qe_edge.errors import UnknownNameError


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LaunchTime(_Strict):
    """Microseconds from one kernel to the next.

    Attributes:
        stream: Launched one by one.
        graph: In a CUDA graph.
    """

    stream: float = Field(gt=0)
    graph: float = Field(gt=0)


class Device(_Strict):
    """One row of devices.yaml, which explains the figures."""

    title: str
    chip: str
    multiprocessors: int = Field(gt=0)
    clock_ghz: float = Field(gt=0)
    bandwidth_gbs: float = Field(gt=0)
    memory_gib: float = Field(gt=0)
    int8_macs: int = Field(gt=0)
    fp16_macs: int = Field(gt=0)
    launch_us: LaunchTime
    source: str

    def per_second(self, per_cycle: float) -> float:
        """What all multiprocessors do in a second that one does `per_cycle` of in a cycle."""
        return per_cycle * self.multiprocessors * self.clock_ghz * 1e9


class Efficiency(_Strict):
    """Share of each peak that a good kernel is assumed to reach."""

    bandwidth: float = Field(gt=0, le=1)
    tensor: float = Field(gt=0, le=1)
    issue: float = Field(gt=0, le=1)


class DeviceTable(_Strict):
    """devices.yaml."""

    devices: dict[str, Device]
    warp_instructions_per_cycle: float = Field(gt=0)
    efficiency: Efficiency
    other_launches: int = Field(ge=0)


class EdgeLLM(_Strict):
    """TensorRT Edge-LLM's W4A16 kernels, disassembled: instructions of one warp."""

    version: str
    chip: str
    prefill_per_1000_mac: float = Field(gt=0)
    decode_per_kib: dict[int, float]

    def decode(self, tokens: int) -> float | None:
        """Instructions per KiB of weights of the decode kernel, None where it is not used."""
        return next((cost for limit, cost in sorted(self.decode_per_kib.items()) if tokens <= limit), None)


class InstructionTable(_Strict):
    """instructions.json, written by benchmarks/kernel_static.py: warp instructions in the loop over K.

    Attributes:
        prefill_per_1000_mac: By chip and kernel variant.
        decode_per_kib: By chip and kernel variant, whose ending t8 or t16 is the largest number of tokens; for 2048
            weights, which are a KiB when they have 4 bits.
        edge_llm: The same of the kernels that ours are compared with.
    """

    prefill_per_1000_mac: dict[str, dict[str, float]]
    decode_per_kib: dict[str, dict[str, float]]
    edge_llm: EdgeLLM


@lru_cache(maxsize=1)
def device_table() -> DeviceTable:
    """All devices, and what is assumed of every one."""
    return DeviceTable.model_validate(yaml.safe_load(_text("devices.yaml")))


@lru_cache(maxsize=1)
def instruction_table() -> InstructionTable:
    """Instruction counts of the compiled kernels."""
    return InstructionTable.model_validate_json(_text("instructions.json"))


@lru_cache(maxsize=1)
def model_table() -> dict[str, Any]:
    """Shapes of the paper's models, for `qe_edge.predict.shapes`."""
    return dict(yaml.safe_load(_text("models.yaml")))


def get_device(name: str) -> Device:
    """Look up a device.

    Raises:
        UnknownNameError: If there is none of that name; it lists all.
    """
    devices = device_table().devices
    if name not in devices:
        raise UnknownNameError("device", name, devices)
    return devices[name]


def _text(name: str) -> str:
    return files("qe_edge.predict").joinpath(name).read_text(encoding="utf-8")
