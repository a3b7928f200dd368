"""The language models that can be exported: checked before anything is quantized, and again by the export itself."""

from __future__ import annotations

from typing import Any

from qe_edge.models.family import ModelFamily
from qe_edge.system.errors import ModelError

# frequencies that do not depend on the length of the text, up to the length that `context_of` gives: beyond it, dynamic
# computes others, and longrope has a second set
FIXED_ROPES = ("default", "linear", "dynamic", "longrope", "yarn", "llama3", "proportional")
OF_LENGTH = ("dynamic", "longrope")  # fixed in models whose layers all have the same frequencies
MAX_LOGITS = 256  # positions of a row whose logits an engine computes at a time: 622 MB for four rows of Qwen2-VL-2B
FULL, SLIDING = "full_attention", "sliding_attention"
CONV, LINEAR = "conv", "linear_attention"  # a short convolution; the gated delta rule behind one
SIZES = {CONV: "conv_L_cache", LINEAR: "linear_conv_kernel_dim"}  # the setting that models with such layers have
ANOTHER = f"Choose a model whose rope_type is one of {', '.join(FIXED_ROPES)}."


def check_exportable(config: Any) -> None:  # noqa: ANN401 - transformers' configuration classes
    """Refuse a language model that cannot be exported. A vision encoder without one passes.

    Args:
        config: Configuration of a model, or of its language model.

    Raises:
        ModelError: If a part cannot be exported. The message names it.

    Example:
        >>> from transformers import LlamaConfig
        >>> check_exportable(LlamaConfig())  # fine
        >>> check_exportable(LlamaConfig(layer_types=["linear_attention"] * 32))
        Traceback (most recent call last):
            ...
        qe_edge.system.errors.ModelError: The language model has layers of the kind 'linear_attention', which
        cannot be exported. Choose a model of full or sliding-window attention, short convolutions or gated
        delta rules.
    """
    text = config.get_text_config()
    if getattr(layer_config(text, 0), "num_key_value_heads", None) is None:
        return
    for rope in _ropes(text):
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in FIXED_ROPES:
            raise ModelError(f"The language model's rope_type '{kind}' cannot be exported.", ANOTHER)
        if kind in OF_LENGTH and rope is not text.rope_parameters:
            problem = f"The language model's rope_type '{kind}' of one kind of layers cannot be exported."
            raise ModelError(problem, ANOTHER)
    stateful = {kind for kind, setting in SIZES.items() if hasattr(text, setting)}
    kinds = sorted(layer_kinds(text) - {FULL, SLIDING} - stateful)
    if kinds:
        raise ModelError(
            f"The language model has layers of the kind '{kinds[0]}', which cannot be exported.",
            "Choose a model of full or sliding-window attention, short convolutions or gated delta rules.",
        )


def context_of(config: Any) -> int:  # noqa: ANN401 - transformers' configuration classes
    """Longest text of a language model, in tokens.

    It is `max_position_embeddings`; for longrope the length up to which transformers has the short set of factors.

    Args:
        config: Configuration of a model, or of its language model.

    Example:
        >>> from transformers import LlamaConfig
        >>> rope = {"rope_type": "longrope", "short_factor": [1.0] * 32, "long_factor": [4.0] * 32, "rope_theta": 1e4}
        >>> sizes = {"hidden_size": 128, "num_attention_heads": 2, "max_position_embeddings": 131_072}
        >>> context_of(LlamaConfig(**sizes))
        131072
        >>> context_of(LlamaConfig(**sizes, rope_parameters={**rope, "original_max_position_embeddings": 4096}))
        4096
    """
    text = config.get_text_config()
    lengths = [rope["original_max_position_embeddings"] for rope in _ropes(text) if rope.get("rope_type") == "longrope"]
    return min(text.max_position_embeddings, *lengths) if lengths else int(text.max_position_embeddings)


def layer_config(config: Any, layer: int) -> Any:  # noqa: ANN401 - transformers' configuration classes
    """A text model's configuration with the sizes of one layer, where layers differ.

    Example:
        >>> from transformers import Gemma4TextConfig, LlamaConfig
        >>> config = Gemma4TextConfig(num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"])
        >>> [layer_config(config, layer).head_dim for layer in range(2)]
        [256, 512]
        >>> layer_config(LlamaConfig(), 3).num_key_value_heads
        32
    """
    return config.per_layer_config[layer] if getattr(config, "is_heterogeneous", False) else config


def layer_kinds(text: Any) -> set[str]:  # noqa: ANN401
    """The kinds of a language model's layers, as transformers names them; empty where all layers are alike.

    Example:
        >>> from transformers import Gemma2Config
        >>> sorted(layer_kinds(Gemma2Config()))
        ['full_attention', 'sliding_attention']
    """
    return set(getattr(text, "layer_types", None) or ())


def window_of(text: Any) -> int | None:  # noqa: ANN401
    """Number of tokens that a token of a sliding-window layer attends to, itself included; None without such layers.

    transformers' classes without `layer_types` that have the setting obey it in every layer. Llama ignores it.

    Example:
        >>> from transformers import Gemma2Config, LlamaConfig
        >>> window_of(Gemma2Config()), window_of(LlamaConfig())
        (4096, None)
    """
    kinds = layer_kinds(text)
    known = "sliding_window" in getattr(type(text), "__dataclass_fields__", {})
    if not (SLIDING in kinds if kinds else known and getattr(text, "use_sliding_window", True)):
        return None
    window: int | None = getattr(text, "sliding_window", None)
    return window


def check_deployable(family: ModelFamily) -> None:
    """Refuse a model whose answers cannot be compared, because it writes none: a vision encoder, one that acts.

    Raises:
        ModelError: If it is one.

    Example:
        >>> from qe_edge.demo import model_path
        >>> from qe_edge.models.configuration import load_family
        >>> check_deployable(load_family(str(model_path())))  # fine: it writes text
    """
    if not family.writes_text:
        raise ModelError(
            f"A '{family.model_type}' model writes no text, so 'deploy' has no answers to compare.",
            "Run 'qe-edge quantize', 'qe-edge export' and 'qe-edge build' one after the other"
            f"{', then qe-edge validate' * family.acts}.",
        )
    check_exportable(family.config)


def _ropes(text: Any) -> list[dict[str, Any]]:  # noqa: ANN401
    """Settings of rotary positions: one table, or one for each kind of layer."""
    found = getattr(text, "rope_parameters", None) or {}
    return [table for table in found.values() if isinstance(table, dict)] or [found]
