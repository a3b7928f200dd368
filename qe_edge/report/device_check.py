"""Results of the plugin's device kit on a machine with a GPU (plugins/DEVICE.md), read for the report's page."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qe_edge.system.errors import ArtifactError

MAX_BYTES = 64 << 20


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModeResult(_Strict):
    """One layer at one number of tokens, with one tactic, against the float64 reference.

    Attributes:
        mode: Name of the mode.
        k: in_features.
        n: out_features.
        tokens: Number of tokens.
        block_rows: Rows of a tile in prefill; 0 where the plan chose.
        decode_warps: Warps in decode; 0 where the plan chose.
        multiprocessors: Multiprocessors that the plan was made for; 0 if it was not told.
        clusters: 0 for none, 1 where the plan chose their size, or the number of blocks.
        error: Relative error; infinite if a value was not finite.
        rerouted: Tokens for which two experts had equal scores and the other one was chosen.
        same_bits: Whether a second run gave the same bits.
        counters_zero: Whether the plan left its counters as it found them.
        in_bounds: Whether nothing was written behind y and the workspace.
        passed: Whether all of these checks passed.
    """

    mode: str
    k: int
    n: int
    tokens: int
    block_rows: int
    decode_warps: int
    multiprocessors: int
    clusters: int = 0
    error: float
    rerouted: int
    same_bits: bool
    counters_zero: bool
    in_bounds: bool
    passed: bool


class _Time(_Strict):
    """Median of replays of a CUDA graph with cold weights.

    Attributes:
        model: The model that the layers belong to.
        tokens: Number of tokens.
        bytes: The least that has to be read and written.
        microseconds: The time.
        times_float16: How many times as fast as cuBLAS FP16 in the same run; None if unknown.
    """

    model: str
    tokens: int
    bytes: int
    microseconds: float = Field(gt=0)
    times_float16: float | None


class PeerTime(_Time):
    """One product by other software than the plugin.

    Attributes:
        peer: Name of the software.
        k: in_features.
        n: out_features.
        copies: How many copies of the layer were used in turn.
    """

    peer: str
    k: int
    n: int
    copies: int


class LinearTime(_Time):
    """One linear layer in the plugin's kernels.

    Attributes:
        mode: How it is quantized.
        k: in_features.
        n: out_features.
        block_rows: Rows of a tile in prefill; 0 where the plan chose.
        launches: How many of the plan's launches ran, from the first.
        of_launches: How many it has.
        kernel: Name of the last kernel that ran.
        copies: How many copies of the layer were used in turn.
    """

    mode: str
    k: int
    n: int
    block_rows: int
    launches: int
    of_launches: int
    kernel: str
    copies: int


class StepTime(_Time):
    """The linear layers of all blocks in the plugin's kernels.

    Attributes:
        mode: How they are quantized.
        blocks: Number of blocks.
        launches: Number of launches of all layers.
    """

    mode: str
    blocks: int
    launches: int


class PeerStepTime(_Time):
    """The linear layers of all blocks by other software than the plugin.

    Attributes:
        peer: Name of the software.
        blocks: Number of blocks.
        launches: Number of launches of all layers.
    """

    peer: str
    blocks: int
    launches: int


class DeviceCheck(_Strict):
    """The content of device.json, which plugins/device/report.py writes.

    Attributes:
        kind: Marks the file as a device check.
        device: Name of the GPU.
        capability: Its compute capability.
        multiprocessors: Its number of multiprocessors.
        l2_bytes: Size of its L2 cache.
        cuda: CUDA version of its driver, as the driver writes it: 13000 is 13.0.
        driver: Version of the driver.
        torch: Version of torch, which the peers use.
        host: Architecture of the machine.
        date: When the run began, in UTC.
        commit: Git's commit of the kit.
        kernels: SHA-256 of the file with the kernels.
        overlaps: Whether launches overlapped.
        copied_gb_per_second: Bandwidth of a copy on the GPU, reading and writing together, in 10^9 bytes per second.
        numerics: Every result that was compared with the reference.
        linears: Times of the linear layers of two models, also of their first launches alone.
        steps: Times of all linear layers of a model in a row.
        peer_linears: Times of the same layers in other software.
        peer_steps: Times of the same steps in other software.
        skipped: Measurements that were skipped, with the reason.
        failures: Failures other than wrong results.
        seconds: How long the run took.
    """

    kind: Literal["qe_edge.device_check"]
    device: str
    capability: tuple[int, int]
    multiprocessors: int
    l2_bytes: int
    cuda: int
    driver: str
    torch: str
    host: str
    date: str
    commit: str
    kernels: str
    overlaps: bool
    copied_gb_per_second: float | None
    numerics: list[ModeResult]
    linears: list[LinearTime]
    steps: list[StepTime]
    peer_linears: list[PeerTime]
    peer_steps: list[PeerStepTime]
    skipped: dict[str, str]
    failures: list[str]
    seconds: float

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
        """CUDA version of the driver as text, for example "13.0"."""
        return f"{self.cuda // 1000}.{self.cuda % 1000 // 10}"

    @property
    def peers(self) -> list[str]:
        """Names of the peers in the order in which they ran."""
        names = [*(step.peer for step in self.peer_steps), *(layer.peer for layer in self.peer_linears)]
        return list(dict.fromkeys(names))

    def speeds(self) -> list[Speed]:
        """One row per layer, mode and number of tokens: the time of the whole plan with the fastest tile."""
        fastest: dict[tuple[str, int, int, int, str], LinearTime] = {}
        for row in self.linears:
            key = (row.model, row.k, row.n, row.tokens, row.mode)
            if row.launches == row.of_launches and (key not in fastest or row.microseconds < fastest[key].microseconds):
                fastest[key] = row
        peers: dict[tuple[str, int, int, int], dict[str, float]] = {}
        for peer in self.peer_linears:
            peers.setdefault((peer.model, peer.k, peer.n, peer.tokens), {})[peer.peer] = peer.microseconds
        return [Speed(row, peers.get(key[:4], {})) for key, row in sorted(fastest.items())]

    def step_speeds(self) -> list[StepSpeed]:
        """One row per model, mode and number of tokens."""
        peers: dict[tuple[str, int], dict[str, float]] = {}
        for peer in self.peer_steps:
            peers.setdefault((peer.model, peer.tokens), {})[peer.peer] = peer.microseconds
        return [StepSpeed(row, peers.get((row.model, row.tokens), {})) for row in self.steps]


@dataclass(frozen=True)
class Speed:
    """One layer on the device.

    Attributes:
        ours: The plugin's time.
        peers: Microseconds of every peer that was measured.
    """

    ours: LinearTime
    peers: dict[str, float]

    def times(self, peer: str) -> float:
        """How many times as fast as a peer. Raises KeyError if it was not measured."""
        return self.peers[peer] / self.ours.microseconds


@dataclass(frozen=True)
class StepSpeed:
    """All linear layers of a model on the device.

    Attributes:
        ours: The plugin's time.
        peers: Microseconds of every peer that was measured.
    """

    ours: StepTime
    peers: dict[str, float]

    def times(self, peer: str) -> float:
        """How many times as fast as a peer. Raises KeyError if it was not measured."""
        return self.peers[peer] / self.ours.microseconds


def load_device_check(path: Path) -> DeviceCheck:
    """Read device.json.

    Raises:
        ArtifactError: If the file is missing, too large, or not what the device kit writes.

    Example:
        >>> check = load_device_check(Path("device.json"))  # doctest: +SKIP
        >>> check.device, len(check.wrong), check.worst_error  # doctest: +SKIP
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
