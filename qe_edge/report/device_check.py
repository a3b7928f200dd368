"""What the plugin's device kit wrote on a machine with a GPU (plugins/DEVICE.md), read for the report's page."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qe_edge.errors import ArtifactError

MAX_BYTES = 64 << 20


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModeResult(_Strict):
    """One mode of the kernels at one number of tokens, against the float64 reference.

    Attributes:
        mode: Name of the mode.
        tokens: Number of tokens.
        error: Relative error; infinite if a value was not finite.
        same_bits: Whether a second run gave the same bits.
        passed: Whether the error is within the limit and the bits are the same.
    """

    mode: str
    tokens: int
    error: float
    same_bits: bool
    passed: bool


class PeerTime(_Strict):
    """Time of one product, by something else than the plugin, in microseconds."""

    model: str
    k: int
    n: int
    tokens: int
    microseconds: float = Field(gt=0)


class TacticTime(PeerTime):
    """Time of one linear layer in the plugin's kernels, with one tactic."""

    mode: str
    block_rows: int
    decode_warps: int


class DeviceCheck(_Strict):
    """device.json.

    Attributes:
        kind: Says what the file is.
        device: Name of the GPU.
        capability: Its compute capability.
        cuda: CUDA version of its driver, as the driver writes it: 13000 is 13.0.
        host: Architecture of the machine.
        numerics: Every mode and number of tokens.
        timings: The linears of two models with every tactic.
        float16: The same shapes as one float16 product each, by cuBLAS.
        tensorrt_int4: The same shapes in TensorRT's own INT4 weight-only path.
        skipped: What was not measured, with the reason.
    """

    kind: Literal["qe_edge.device_check"]
    device: str
    capability: tuple[int, int]
    cuda: int
    host: str
    numerics: list[ModeResult]
    timings: list[TacticTime] = []
    float16: list[PeerTime] = []
    tensorrt_int4: list[PeerTime] = []
    skipped: dict[str, str] = {}

    @property
    def wrong(self) -> list[ModeResult]:
        """Results that were not right."""
        return [row for row in self.numerics if not row.passed]

    @property
    def worst_error(self) -> float:
        """The largest relative error."""
        return max((row.error for row in self.numerics), default=math.nan)

    @property
    def cuda_version(self) -> str:
        """CUDA version of the driver, for reading."""
        return f"{self.cuda // 1000}.{self.cuda % 1000 // 10}"

    def speeds(self) -> list[Speed]:
        """One row per layer, mode and number of tokens, with the fastest tactic."""
        fastest: dict[tuple[str, int, int, int, str], TacticTime] = {}
        for row in self.timings:
            key = (row.model, row.k, row.n, row.tokens, row.mode)
            if key not in fastest or row.microseconds < fastest[key].microseconds:
                fastest[key] = row
        float16, int4 = _by_shape(self.float16), _by_shape(self.tensorrt_int4)
        return [Speed(row, float16.get(key[:4]), int4.get(key[:4])) for key, row in sorted(fastest.items())]


@dataclass(frozen=True)
class Speed:
    """One layer on the device.

    Attributes:
        ours: The plugin's fastest tactic.
        float16: Microseconds of the float16 product, None if not measured.
        int4: Microseconds of TensorRT's INT4 weight-only product, None if not measured.
    """

    ours: TacticTime
    float16: float | None
    int4: float | None

    def times_float16(self) -> float | None:
        """How many times as fast as float16."""
        return None if self.float16 is None else self.float16 / self.ours.microseconds

    def times_int4(self) -> float | None:
        """How many times as fast as TensorRT's INT4."""
        return None if self.int4 is None else self.int4 / self.ours.microseconds


def _by_shape(rows: Iterable[PeerTime]) -> dict[tuple[str, int, int, int], float]:
    return {(row.model, row.k, row.n, row.tokens): row.microseconds for row in rows}


def load_device_check(path: Path) -> DeviceCheck:
    """Read device.json.

    Raises:
        ArtifactError: If the file is missing, too large, or not what the device kit writes.
    """
    remedy = "Give the device.json of plugins/device_check.sh."
    if not path.is_file() or path.stat().st_size > MAX_BYTES:
        raise ArtifactError(f"There is no device check '{path}'.", remedy)
    try:
        return DeviceCheck.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise ArtifactError(f"'{path}' is no device check: {where}: {first['msg']}.", remedy) from error
