"""InternVL in OpenGVLab's own layout, brought into transformers' own: configuration and names of tensors.

The original layout needs code of its own to run; none of it is executed here. InternLM2, which transformers does not
have, is Llama with other names: its rows `wqkv` hold, for every key and value head, the queries that share it, its key
and its value, `[heads, group + 2, head_dim]`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from qe_edge.models.config_values import Context as Tokens
from qe_edge.models.config_values import Epsilon, Heads, InnerWidth, Layers, Patch, Rope, Side, Vocabulary, Width
from qe_edge.system.errors import ModelError, printable

if TYPE_CHECKING:
    from torch import Tensor

ORIGINAL = "internvl_chat"  # model_type of the layout
TEXT_MODELS = {"internlm2": "llama", "qwen2": "qwen2"}  # what transformers calls them
LAYER = r"(?P<layer>language_model\.model\.layers\.\d+|vision_model\.encoder\.layers\.\d+)\."
RENAMED = (  # of parts of names, in this order
    (r"^language_model\.model\.", "model.language_model."),
    (r"^language_model\.(output|lm_head)\.", "lm_head."),
    (r"\.tok_embeddings\.", ".embed_tokens."),
    (r"\.attention\.wo\.", ".self_attn.o_proj."),
    (r"\.feed_forward\.w1\.", ".mlp.gate_proj."),
    (r"\.feed_forward\.w3\.", ".mlp.up_proj."),
    (r"\.feed_forward\.w2\.", ".mlp.down_proj."),
    (r"\.attention_norm\.", ".input_layernorm."),
    (r"\.ffn_norm\.", ".post_attention_layernorm."),
    (r"^vision_model\.encoder\.layers\.", "model.vision_tower.encoder.layer."),
    (r"^vision_model\.embeddings\.class_embedding$", "model.vision_tower.embeddings.cls_token"),
    (r"^vision_model\.embeddings\.position_embedding$", "model.vision_tower.embeddings.position_embeddings"),
    (
        r"^vision_model\.embeddings\.patch_embedding\.",
        "model.vision_tower.embeddings.patch_embeddings.projection.",
    ),
    (r"(vision_tower\.encoder\.layer\.\d+)\.ls([12])$", r"\1.lambda_\2"),
    (r"(vision_tower\.encoder\.layer\.\d+)\.norm1\.", r"\1.layernorm_before."),
    (r"(vision_tower\.encoder\.layer\.\d+)\.norm2\.", r"\1.layernorm_after."),
    (r"(vision_tower\.encoder\.layer\.\d+)\.attn\.proj\.", r"\1.attention.projection_layer."),
    (r"(vision_tower\.encoder\.layer\.\d+)\.attn\.", r"\1.attention."),
    (r"^mlp1\.0\.", "model.multi_modal_projector.layer_norm."),
    (r"^mlp1\.1\.", "model.multi_modal_projector.linear_1."),
    (r"^mlp1\.3\.", "model.multi_modal_projector.linear_2."),
)


class _Text(BaseModel):
    model_config = ConfigDict(extra="allow")
    model_type: Literal["internlm2", "qwen2"]
    hidden_size: Width
    intermediate_size: InnerWidth
    num_hidden_layers: Layers
    num_attention_heads: Heads
    num_key_value_heads: Heads
    vocab_size: Vocabulary
    max_position_embeddings: Tokens
    rms_norm_eps: Epsilon
    rope_theta: Annotated[float, Field(ge=1, le=1e12)] = 10000.0
    rope_scaling: Rope | None = None
    hidden_act: Literal["silu"] = "silu"
    bias: Literal[False] = False  # of InternLM2
    tie_word_embeddings: bool = False
    use_sliding_window: bool = False


class _Vision(BaseModel):
    model_config = ConfigDict(extra="allow")
    hidden_size: Width
    intermediate_size: InnerWidth
    num_hidden_layers: Layers
    num_attention_heads: Heads
    image_size: Side
    patch_size: Patch
    layer_norm_eps: Epsilon = 1e-6
    hidden_act: str = "gelu"
    norm_type: Literal["layer_norm", "rms_norm"] = "rms_norm"
    qkv_bias: bool = False
    qk_normalization: bool = False


class OriginalConfig(BaseModel):
    """config.json of the original layout, as far as it says what is computed."""

    model_config = ConfigDict(extra="allow")
    llm_config: _Text
    vision_config: _Vision
    downsample_ratio: Annotated[float, Field(gt=0, le=1)] = 0.5
    ps_version: Literal["v2"]
    select_layer: Literal[-1] = -1
    force_image_size: Side | None = None
    dynamic_image_size: bool = False
    max_dynamic_patch: Annotated[int, Field(ge=1, le=64)] = 6
    min_dynamic_patch: Annotated[int, Field(ge=1, le=64)] = 1
    use_thumbnail: bool = False
    template: str
    torch_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"


def converted_config(original: OriginalConfig, image_token: int, end_token: int) -> dict[str, Any]:
    """config.json of the same model in transformers' own layout.

    Args:
        original: The original one.
        image_token: Id of the token at whose places features stand.
        end_token: Id of the token that ends an answer.

    Raises:
        ModelError: If pictures have another size than the vision encoder's.

    Example:
        >>> from pathlib import Path  # doctest: +SKIP
        >>> import json  # doctest: +SKIP
        >>> values = json.loads(Path("InternVL2-2B/config.json").read_text())  # doctest: +SKIP
        >>> converted_config(OriginalConfig.model_validate(values), 92546, 92542)["model_type"]  # doctest: +SKIP
    """
    text, vision = original.llm_config, original.vision_config
    if original.force_image_size not in (None, vision.image_size):
        raise ModelError(
            f"Pictures have {original.force_image_size} pixels a side, and the vision encoder takes "
            f"{vision.image_size}.",
            "Choose a model whose force_image_size is its vision encoder's image_size.",
        )
    side = int(vision.image_size // vision.patch_size * original.downsample_ratio)
    rope = text.rope_scaling.model_dump(exclude_none=True) if text.rope_scaling else {}
    rope["rope_type"] = rope.pop("type", rope.get("rope_type", "default"))
    shared = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    text_values = {
        "model_type": TEXT_MODELS[text.model_type],
        **{key: getattr(text, key) for key in shared},
        **{key: getattr(text, key) for key in ("num_key_value_heads", "vocab_size", "max_position_embeddings")},
        **{key: getattr(text, key) for key in ("rms_norm_eps", "hidden_act", "tie_word_embeddings")},
        "rope_parameters": {**rope, "rope_theta": text.rope_theta},
        "eos_token_id": end_token,
        "bos_token_id": None,
        "pad_token_id": None,
    }
    vision_values = {
        "model_type": "internvl_vision",
        **{key: getattr(vision, key) for key in (*shared, "layer_norm_eps", "hidden_act", "norm_type")},
        "image_size": [vision.image_size] * 2,
        "patch_size": [vision.patch_size] * 2,
        "attention_bias": vision.qkv_bias,
        "use_qk_norm": vision.qk_normalization,
    }
    return {
        "architectures": ["InternVLForConditionalGeneration"],
        "model_type": "internvl",
        "text_config": text_values,
        "vision_config": vision_values,
        "image_token_id": image_token,
        "image_seq_length": side**2,
        "downsample_ratio": original.downsample_ratio,
        "tie_word_embeddings": text.tie_word_embeddings,
        "dtype": original.torch_dtype,
    }


def converted_tensors(original: OriginalConfig, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """What a tensor of the original layout is in transformers' own: name and tensor, three of each fused projection.

    Raises:
        ModelError: If the layout has no such tensor.

    Example:
        >>> from pathlib import Path  # doctest: +SKIP
        >>> import json  # doctest: +SKIP
        >>> import torch  # doctest: +SKIP
        >>> values = json.loads(Path("InternVL2-2B/config.json").read_text())  # doctest: +SKIP
        >>> config, name = OriginalConfig.model_validate(values), "language_model.model.norm.weight"  # doctest: +SKIP
        >>> [new for new, _ in converted_tensors(config, name, torch.ones(2048))]  # doctest: +SKIP
    """
    text = original.llm_config
    fused = re.fullmatch(LAYER + r"(?P<module>attention\.wqkv|attn\.qkv)\.(?P<leaf>weight|bias)", name)
    if fused is None:
        yield _renamed(name), tensor
        return
    rows = len(tensor) if tensor.dim() else 0
    if fused["module"] == "attn.qkv":
        _check_rows(name, rows, 3 * original.vision_config.hidden_size)
        parts = tuple(tensor.chunk(3))
        module = f"{fused['layer']}.attn"
    else:
        heads, width = text.num_key_value_heads, text.hidden_size // text.num_attention_heads
        group = text.num_attention_heads // heads
        _check_rows(name, rows, heads * (group + 2) * width)
        split = tensor.reshape(heads, group + 2, width, *tensor.shape[1:])
        parts = tuple(part.reshape(-1, *tensor.shape[1:]) for part in (split[:, :group], split[:, -2], split[:, -1]))
        module = f"{fused['layer']}.self_attn"
    for letter, part in zip("qkv", parts, strict=True):
        yield _renamed(f"{module}.{letter}_proj.{fused['leaf']}"), part.contiguous()


def _check_rows(name: str, rows: int, wanted: int) -> None:
    if rows != wanted:
        raise ModelError(
            f"Tensor '{printable(name)[:200]}' has {rows} rows; its configuration asks for {wanted}.",
            "Download the model again.",
        )


def _renamed(name: str) -> str:
    for pattern, replacement in RENAMED:
        name = re.sub(pattern, replacement, name)
    if not name.startswith(("model.", "lm_head.")):
        raise ModelError(
            f"The original layout of InternVL has no tensor '{printable(name)[:200]}'.",
            "Give the model as it was made.",
        )
    return name
