"""The fitted timing of the kernels, as timing.yaml has it."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class StrictTable(BaseModel):
    """A table of a data file: no unknown key, and nothing changes it.

    Example:
        >>> LibraryTiming(fixed=1.0, per_channel=2.0).fixed
        1.0
    """

    model_config = ConfigDict(extra="forbid", frozen=True)


class PrepareTiming(StrictTable):
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


class PrepareDownTiming(StrictTable):
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


class DownDecodeTiming(StrictTable):
    """The down-projection for few tokens; its blocks split the channels.

    Attributes:
        fixed: Cycles of every launch.
        per_channel: Cycles of a block for one of its channels.
        scores: Cycles that the router's scores of a token add to it, where this kernel finds them.
    """

    fixed: float
    per_channel: float
    scores: float


class TiledTiming(StrictTable):
    """A kernel whose blocks walk over all channels.

    Attributes:
        fixed: Cycles of every launch.
        per_channel: Cycles of a block for one channel.
        per_channel_and_block: What each block on the same multiprocessor adds to it.
    """

    fixed: float
    per_channel: float
    per_channel_and_block: float


class MainDecodeTiming(StrictTable):
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


class ClusterTiming(StrictTable):
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


class MainPrefillTiming(StrictTable):
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


class LibraryTiming(StrictTable):
    """A GEMM of cuBLAS.

    Attributes:
        fixed: Cycles of every launch.
        per_channel: Cycles of a lone block for one channel.
    """

    fixed: float
    per_channel: float


class EdgeDecodeTiming(StrictTable):
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


class Timing(StrictTable):
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
