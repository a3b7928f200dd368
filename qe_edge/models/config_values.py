"""Keys of config.json that have bounds: beyond them there is no model, only memory that a file should not ask for.

Keys that are not named here are transformers' to check.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Width = Annotated[int, Field(strict=True, ge=1, le=2**16)]
InnerWidth = Annotated[int, Field(strict=True, ge=1, le=2**19)]
Layers = Annotated[int, Field(strict=True, ge=1, le=512)]
Heads = Annotated[int, Field(strict=True, ge=1, le=1024)]
HeadWidth = Annotated[int, Field(strict=True, ge=1, le=1024)]
Vocabulary = Annotated[int, Field(strict=True, ge=2, le=2**20)]
Context = Annotated[int, Field(strict=True, ge=1, le=2**24)]
Patch = Annotated[int, Field(strict=True, ge=1, le=64)]
Side = Annotated[int, Field(strict=True, ge=1, le=4096)]
Index = Annotated[int, Field(strict=True, ge=0, le=511)]
Factor = Annotated[int, Field(strict=True, ge=1, le=16)]
Token = Annotated[int, Field(strict=True, ge=-1, le=2**21)]  # -1: none, in old Llama checkpoints
Epsilon = Annotated[float, Field(strict=True, gt=0, le=0.1, allow_inf_nan=False)]
Share = Annotated[float, Field(strict=True, ge=0, le=1, allow_inf_nan=False)]
Positive = Annotated[float, Field(strict=True, gt=0, le=1e12, allow_inf_nan=False)]
Pair = Annotated[list[Side], Field(min_length=1, max_length=2)]
PatchPair = Annotated[list[Patch], Field(min_length=1, max_length=2)]
RopeType = Literal["default", "mrope", "axial", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional"]
DType = Literal["float32", "float16", "bfloat16", "auto"]


class Rope(BaseModel):
    """Rotary positions, under any of the names that they had: rope_parameters, rope_scaling."""

    rope_theta: Annotated[float, Field(strict=True, ge=1, le=1e12, allow_inf_nan=False)] | None = None
    rope_type: RopeType | None = None
    type: RopeType | None = None
    factor: Positive | None = None
    original_max_position_embeddings: Context | None = None
    low_freq_factor: Positive | None = None
    high_freq_factor: Positive | None = None
    beta_fast: Positive | None = None
    beta_slow: Positive | None = None
    attention_factor: Positive | None = None
    mscale: Positive | None = None
    mscale_all_dim: Positive | None = None
    partial_rotary_factor: Annotated[float, Field(strict=True, gt=0, le=1)] | None = None
    short_factor: Annotated[list[Positive], Field(max_length=512)] | None = None
    long_factor: Annotated[list[Positive], Field(max_length=512)] | None = None
    mrope_section: Annotated[list[Heads], Field(max_length=3)] | None = None


class Sizes(BaseModel):
    """Sizes of one transformer, as far as a table names them; None where it does not."""

    hidden_size: Width | None = None
    embed_dim: Width | None = None
    intermediate_size: InnerWidth | None = None
    num_hidden_layers: Layers | None = None
    depth: Layers | None = None
    num_attention_heads: Heads | None = None
    num_heads: Heads | None = None
    num_key_value_heads: Heads | None = None
    head_dim: HeadWidth | None = None
    vocab_size: Vocabulary | None = None
    max_position_embeddings: Context | None = None
    patch_size: Patch | PatchPair | None = None
    image_size: Side | Pair | None = None
    spatial_merge_size: Factor | None = None
    out_hidden_size: Width | None = None
    crop_size: Side | None = None
    feature_layer: Annotated[int, Field(strict=True, ge=-512, le=512)] | None = None
    image_token_id: Annotated[int, Field(strict=True, ge=0, le=2**21)] | None = None
    num_blocks: Layers | None = None  # of an audio encoder
    window_size: Side | None = None
    num_position_embeddings: Context | None = None
    temporal_patch_size: Factor | Annotated[list[Factor], Field(max_length=2)] | None = None
    in_channels: Literal[3] | None = None  # pictures are RGB
    num_channels: Literal[3] | None = None
    mlp_ratio: Annotated[float, Field(strict=True, gt=0, le=64)] | None = None


ATTENTION = ("sdpa", "eager")  # implementations that every machine has


class LayerSizes(BaseModel):
    """Sizes in which one layer of Gemma 4 differs from the others."""

    model_config = ConfigDict(extra="forbid")
    head_dim: HeadWidth | None = None
    num_key_value_heads: Heads | None = None


class Section(Sizes):
    """One transformer: sizes, numbers of its formulas, token ids.

    Raises:
        ValueError: For an attention implementation that is code to be downloaded, or that needs other libraries.
    """

    model_config = ConfigDict(extra="allow")

    architectures: Annotated[list[str], Field(max_length=64)] | None = None
    layer_types: Annotated[list[str], Field(max_length=512)] | None = None
    max_window_layers: Annotated[int, Field(strict=True, ge=0, le=4096)] | None = None
    fullatt_block_indexes: Annotated[list[Index], Field(max_length=512)] | None = None
    deepstack_visual_indexes: Annotated[list[Index], Field(max_length=64)] | None = None
    sliding_window: Annotated[int, Field(strict=True, ge=0, le=2**24)] | None = None
    rms_norm_eps: Epsilon | None = None
    layer_norm_eps: Epsilon | None = None
    initializer_range: Share | None = None
    attention_dropout: Share | None = None
    hidden_dropout_prob: Share | None = None
    attention_probs_dropout_prob: Share | None = None
    projection_dropout: Share | None = None
    drop_path_rate: Share | None = None
    layerscale_value: Annotated[float, Field(strict=True, allow_inf_nan=False)] | None = None
    layer_scale_init_value: Annotated[float, Field(strict=True, allow_inf_nan=False)] | None = None
    rope_theta: Annotated[float, Field(strict=True, ge=1, le=1e12, allow_inf_nan=False)] | None = None
    rope_parameters: Rope | None = None
    rope_scaling: Rope | None = None
    original_max_position_embeddings: Context | None = None
    dtype: DType | None = None
    torch_dtype: DType | None = None
    num_labels: Annotated[int, Field(strict=True, ge=0, le=2**17)] | None = None
    return_dict: Literal[True] | None = None  # models answer with named outputs
    output_attentions: Annotated[bool, Field(strict=True)] | None = None
    output_hidden_states: Annotated[bool, Field(strict=True)] | None = None
    is_encoder_decoder: Literal[False] | None = None
    per_layer_config: dict[Annotated[str, Field(pattern=r"^[0-9]{1,3}$")], LayerSizes] | None = None
    global_head_dim: HeadWidth | None = None
    num_global_key_value_heads: Heads | None = None
    num_kv_shared_layers: Annotated[int, Field(strict=True, ge=0, le=511)] | None = None
    hidden_size_per_layer_input: Annotated[int, Field(strict=True, ge=0, le=2**12)] | None = None
    vocab_size_per_layer_input: Vocabulary | None = None
    position_embedding_size: Annotated[int, Field(strict=True, ge=1, le=2**16)] | None = None
    pooling_kernel_size: Factor | None = None
    bos_token_id: Token | Annotated[list[Token], Field(max_length=64)] | None = None
    eos_token_id: Token | Annotated[list[Token], Field(max_length=64)] | None = None
    pad_token_id: Token | None = None

    @model_validator(mode="after")
    def _no_code_of_others(self) -> Section:
        for key, value in (self.model_extra or {}).items():
            if key.endswith("attn_implementation") and not _runs_anywhere(value):
                raise ValueError(
                    f"'{key}' asks for another attention than {' or '.join(ATTENTION)}; take this key out, since it "
                    f"changes no weight"
                )
            if "_implementation" in key and not _known_implementation(value):
                raise ValueError(f"'{key}' names an implementation that is not transformers' own")
        return self


class ConfigFile(Section):
    """config.json of any family: flat, or with a section for each transformer.

    A model that acts has a vision-language model in one section, and an expert that makes actions in another.
    """

    text_config: Section | None = None
    vision_config: Section | None = None
    video_token_id: Token | None = None
    image_seq_length: Annotated[int, Field(strict=True, ge=1, le=2**16)] | None = None
    downsample_ratio: Annotated[float, Field(strict=True, gt=0, le=1)] | None = None
    scale_factor: Factor | None = None
    image_grid_pinpoints: Annotated[list[Pair], Field(min_length=1, max_length=256)] | None = None
    vlm_config: ConfigFile | None = None
    dit_config: Section | None = None
    chunk_size: Annotated[int, Field(strict=True, ge=1, le=4096)] | None = None
    max_state_dim: Width | None = None
    max_action_dim: Width | None = None
    num_inference_steps: Annotated[int, Field(strict=True, ge=1, le=1000)] | None = None
    min_period: Positive | None = None
    max_period: Positive | None = None
    audio_config: Section | None = None
    vision_aspect_ratio: Annotated[str, Field(pattern=r"^anyres_max_[1-9][0-9]?$")] | None = None

    @model_validator(mode="after")
    def _layers_differ_in_gemma4_alone(self) -> ConfigFile:
        sections = (self, self.text_config, self.vision_config)
        if (self.model_extra or {}).get("model_type") != "gemma4" and any(s and s.per_layer_config for s in sections):
            raise ValueError("'per_layer_config' gives layers other sizes, which only Gemma 4 has")
        return self


class _SizesSection(Sizes):
    hidden_size: Width
    num_attention_heads: Heads
    num_hidden_layers: Layers
    intermediate_size: InnerWidth
    vocab_size: Vocabulary


class SizesFile(BaseModel):
    """What a prediction reads of a vision-language model: sizes only, which the family's own names may carry."""

    model_config = ConfigDict(extra="allow")
    vision_config: Sizes
    text_config: _SizesSection | None = None
    downsample_ratio: Annotated[float, Field(strict=True, ge=0.125, le=1)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _flat(cls, values: Any) -> Any:  # noqa: ANN401 - pydantic's own form
        """The hub's Qwen2-VL has the sizes of its language model beside the section of its vision encoder."""
        if isinstance(values, dict) and values.get("text_config") is None:
            return {**values, "text_config": values}
        return values


def _known_implementation(value: object) -> bool:
    """Whether it is a name of transformers' own, not a repository of kernels on the hub."""
    if isinstance(value, dict):
        return all(_known_implementation(found) for found in value.values())
    return value is None or isinstance(value, bool) or (isinstance(value, str) and not set("/:@") & set(value))


def _runs_anywhere(value: object) -> bool:
    """Whether it is computed by torch alone; what is code to be downloaded is told by another check."""
    if isinstance(value, dict):
        return all(_runs_anywhere(found) for found in value.values())
    return value is None or value in ATTENTION or not _known_implementation(value)
