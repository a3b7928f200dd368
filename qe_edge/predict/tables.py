"""The data files: devices, the paper's models, instruction counts of the compiled kernels, and fitted timing."""

from __future__ import annotations

from functools import lru_cache
from importlib.resources import files
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field

from qe_edge.system.errors import UnknownNameError


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LaunchTime(_Strict):
    """Microseconds from one kernel to the next.

    Attributes:
        stream: Time if kernels are launched one by one.
        graph: Time in a CUDA graph.
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


class DeviceTable(_Strict):
    """The content of devices.yaml."""

    devices: dict[str, Device]
    warp_instructions_per_cycle: float = Field(gt=0)
    other_launches: int = Field(ge=0)
    other_cycles: float = Field(ge=0)


class PrepareTiming(_Strict):
    """The kernel that quantizes activations; one block per token.

    Attributes:
        fixed: Cycles of every launch.
        per_thread_channel: Cycles that a thread takes for one of its channels.
        router_per_thread_channel: The same for one expert's score.
        per_channel: Cycles of a multiprocessor for one channel of one token, where many blocks run.
        router_per_channel: The same for one expert's score.
        float_factor: What 16-bit activations cost relative to INT8.
    """

    fixed: float
    per_thread_channel: float
    router_per_thread_channel: float
    per_channel: float
    router_per_channel: float
    float_factor: float


class PrepareDownTiming(_Strict):
    """The kernel that quantizes the activations of many tokens and multiplies them by the down-projection.

    Attributes:
        fixed: Cycles of every launch.
        per_warp_channel: Cycles that a warp takes for one channel of its tokens.
        per_warp_channel_and_tile: What every 16 ranks of the down-projection add to it.
        float_factor: What 16-bit activations cost relative to INT8.
    """

    fixed: float
    per_warp_channel: float
    per_warp_channel_and_tile: float
    float_factor: float


class DownDecodeTiming(_Strict):
    """The down-projection for few tokens; its blocks split the channels.

    Attributes:
        fixed: Cycles of every launch.
        per_channel: Cycles of a block for one of its channels.
        scores: Cycles that the router's scores of a token add to it, where this kernel finds them.
    """

    fixed: float
    per_channel: float
    scores: float


class TiledTiming(_Strict):
    """A kernel whose blocks walk over all channels.

    Attributes:
        fixed: Cycles of every launch.
        per_channel: Cycles of a block for one channel.
        per_channel_and_block: What each block on the same multiprocessor adds to it.
    """

    fixed: float
    per_channel: float
    per_channel_and_block: float


class MainDecodeTiming(_Strict):
    """The product for few tokens.

    Attributes:
        fixed: Cycles of every launch.
        block: Cycles of a block besides its loop.
        step: Cycles that the weights of one step of the loop take, 128 channels of 32 outputs in 4 bits.
        step_per_instruction: What an instruction per 2048 weights adds to a step.
        correction: Cycles that a low-rank correction adds to a block.
        per_rank: What one rank adds to it, times the root of the tokens.
        per_routed_token: What each token adds to it where experts are routed.
        choose: What choosing a token's expert adds to that, where this kernel does it.
        quantize: Cycles that a token takes to quantize, where this kernel does it.
        quantize_per_thread_channel: What every channel of a thread adds to that.
        float_factor: What 16-bit activations cost in that relative to INT8.
        instructions_per_cycle: Warp instructions that a full multiprocessor issues.
    """

    fixed: float
    block: float
    step: float
    step_per_instruction: float
    correction: float
    per_rank: float
    per_routed_token: float
    choose: float
    quantize: float
    quantize_per_thread_channel: float
    float_factor: float
    instructions_per_cycle: float


class ClusterTiming(_Strict):
    """The launch of clusters for 1 to 4 tokens: weights, and beside them the correction.

    Attributes:
        fixed: Cycles of every launch.
        per_token: Cycles that a token adds.
        quantize: Cycles that a warp takes for 128 channels of a token.
        float_factor: What 16-bit activations cost in both relative to INT8.
        step: Cycles that a warp takes for 128 channels of 32 outputs in 4 bits.
        step_per_instruction: What an instruction per 2048 weights adds to a step.
        correction: Cycles of a correction besides its products.
        per_set: Cycles of 16 ranks of the shared expert for 32 of a block's own outputs.
        choose: Cycles that routing takes besides its products.
        per_expert: Cycles of a token's expert besides its products.
        per_expert_rows: Cycles of a product of 32 channels and 16 ranks of a token's expert.
        per_sum: Cycles of what one slice adds to 32 of a block's own outputs.
        instructions_per_cycle: Warp instructions that a full multiprocessor issues.
    """

    fixed: float
    per_token: float
    quantize: float
    float_factor: float
    step: float
    step_per_instruction: float
    correction: float
    per_set: float
    choose: float
    per_expert: float
    per_expert_rows: float
    per_sum: float
    instructions_per_cycle: float


class MainPrefillTiming(_Strict):
    """The product for many tokens.

    Attributes:
        fixed: Cycles of every launch.
        step: Cycles of one step of the loop, 128 channels.
        instructions_per_cycle: Warp instructions that a multiprocessor issues in the loop.
        block: Cycles of a block besides its loop.
        per_rank: Cycles that one rank of the correction adds to a block.
        alone: How many times as long a block takes that has a multiprocessor for itself.
    """

    fixed: float
    step: float
    instructions_per_cycle: float
    block: float
    per_rank: float
    alone: float


class LibraryTiming(_Strict):
    """A GEMM of cuBLAS.

    Attributes:
        fixed: Cycles of every launch.
        per_channel: Cycles of a lone block for one channel.
    """

    fixed: float
    per_channel: float


class EdgeDecodeTiming(_Strict):
    """The decode kernel of TensorRT Edge-LLM.

    Attributes:
        fixed: Cycles of every launch.
        per_1024_channels: Cycles of a block for 1024 channels.
        instructions_per_cycle: Warp instructions that a full multiprocessor issues for one token.
        per_further_token: How much longer they take for each further token, as a share.
    """

    fixed: float
    per_1024_channels: float
    instructions_per_cycle: float
    per_further_token: float


class Timing(_Strict):
    """The content of timing.yaml: values fitted to measurements.

    Attributes:
        bandwidth: Share of the memory's peak that a kernel reaches.
        tensor: Share of the tensor cores' peak that a library's GEMM reaches.
        overlapped_launch: Share of the launch time that is left where a kernel may start before the previous one ends.
        prepare: The plugin's first kernel.
        prepare_down: The kernel that does the work of the first and the second for many tokens.
        down_decode: The plugin's second kernel for few tokens.
        down_prefill: The plugin's second kernel for many tokens.
        down_integer_factor: Cost of integer factors in the second kernel relative to 16-bit factors, by their bits.
        main_decode: The plugin's last kernel for few tokens.
        main_prefill: The plugin's last kernel for many tokens.
        cluster: The cluster launch for 1 to 4 tokens.
        cluster_per_rows: Cycles of a product of 32 channels and 16 ranks of the shared expert in the cluster launch, by
            the bits of the factors. 8 bits were not measured; the value is the geometric mean of the others.
        library_gemm: A GEMM of cuBLAS.
        edge_decode: TensorRT Edge-LLM for few tokens.
        edge_gemm: TensorRT Edge-LLM for many tokens.
    """

    bandwidth: float = Field(gt=0, le=1)
    tensor: float = Field(gt=0, le=1)
    overlapped_launch: float = Field(gt=0, le=1)
    prepare: PrepareTiming
    prepare_down: PrepareDownTiming
    down_decode: DownDecodeTiming
    down_prefill: TiledTiming
    down_integer_factor: dict[int, float]
    main_decode: MainDecodeTiming
    main_prefill: MainPrefillTiming
    cluster: ClusterTiming
    cluster_per_rows: dict[int, float]
    library_gemm: LibraryTiming
    edge_decode: EdgeDecodeTiming
    edge_gemm: TiledTiming


class Accuracy(_Strict):
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


class EdgeLLM(_Strict):
    """Instructions of one warp in TensorRT Edge-LLM's W4A16 kernels, counted in the disassembly."""

    version: str
    chip: str
    prefill_per_1000_mac: float = Field(gt=0)
    decode_per_kib: dict[int, float]

    def decode(self, tokens: int) -> float | None:
        """Instructions per KiB of weights of the decode kernel, None where it is not used."""
        return next((cost for limit, cost in sorted(self.decode_per_kib.items()) if tokens <= limit), None)


class InstructionTable(_Strict):
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
