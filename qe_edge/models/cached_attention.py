"""Attention of a text model over its KV cache, as exported graphs compute it.

One node a layer, `com.microsoft::GroupQueryAttention`, writes the new keys and values into buffers of a fixed capacity
and attends to what is there. ONNX Runtime computes it in tiles, without the scores of a whole prompt and without a copy
of the cache; `qe_edge.export.cached_attention` gives the node a body of standard operators for other runtimes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qe_edge.models.export_limits import SLIDING, layer_kinds, window_of
from qe_edge.models.layer_states import keeper_of

DOMAIN, NAME, VERSION = "com.microsoft", "GroupQueryAttention", 1
EXPANDED = "expanded"  # attribute of a node that ONNX Runtime has no kernel for: the export writes it out
MULTIPLE = 8  # of which heads' widths are, where it has one
IMPLEMENTATION = "qe_edge_cached"  # how transformers calls the function while it is registered


@dataclass
class CachedAttention:
    """Attention of all layers for one call of a text model, while a graph is traced.

    Attributes:
        config: The text model's configuration.
        past: Key and value `[batch, kv_heads, capacity, head_dim]` of every layer of attention, as "0.key".
        attention_mask: `[batch, total]` int64: a row's tokens, the new ones included, then zeros.
        pictures: Layers in which the tokens of a picture see each other; the mask numbers pictures from 2.
        expanded: Whether the node is to be written out.
        present: What the layers leave, as `past`; filled by the calls.
    """

    config: Any
    past: dict[str, Tensor]
    attention_mask: Tensor
    pictures: Collection[int]
    expanded: bool

    def __post_init__(self) -> None:
        self.present: dict[str, Tensor] = {}
        # int32, as the operator wants them: a row's last token, and the most tokens of a row
        self._last = ((self.attention_mask != 0).sum(1) - 1).to(torch.int32)
        self._total = torch.full((1,), self.attention_mask.shape[1], dtype=torch.int32)

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        _mask: Tensor | None = None,
        *,
        scaling: float | None = None,
        softcap: float | None = None,
        **_keywords: object,
    ) -> tuple[Tensor, None]:
        """As transformers calls it: `[batch, heads, sequence, head_dim]`, and `kv_heads` for keys and values."""
        layer: Any = module.layer_idx
        keeper = keeper_of(self.config, layer)
        heads, kv_heads, width = query.shape[1], key.shape[1], query.shape[3]
        names = [f"{keeper}.{part}" for part in ("key", "value")]
        past = [(self.past if keeper == layer else self.present)[name] for name in names]
        query, key, value = (part.transpose(1, 2).flatten(2) for part in (query, key, value))
        if keeper != layer:  # the new ones are there already
            key, value = key[:, :0], value[:, :0]
        further = [self.attention_mask] if layer in self.pictures else []
        outputs = [(query.shape[0], query.shape[1], heads * width), past[0].shape, past[1].shape]
        mixed, *present = torch.onnx.ops.symbolic_multi_out(
            f"{DOMAIN}::{NAME}",
            [query, key, value, *past, self._last, self._total, *further],
            attrs={
                "num_heads": heads,
                "kv_num_heads": kv_heads,
                "scale": width**-0.5 if scaling is None else float(scaling),
                "local_window_size": self._window(layer),
                "softcap": float(softcap or 0.0),
                **({EXPANDED: 1} if self.expanded else {}),
            },
            dtypes=[query.dtype] * (3 if keeper == layer else 1),
            shapes=outputs[: 3 if keeper == layer else 1],
            version=VERSION,
        )
        if keeper != layer:
            return mixed, None
        self.present.update(zip(names, present, strict=True))
        return mixed, None

    def _window(self, layer: int) -> int:
        """How many tokens, its own included, a token of a layer attends to; -1 for all."""
        window = window_of(self.config)
        slides = not layer_kinds(self.config) or self.config.layer_types[layer] == SLIDING
        return -1 if window is None or not slides else window


@contextmanager
def attending(model: nn.Module, attention: CachedAttention) -> Iterator[None]:
    """Let a text model of transformers attend as `attention` does; undone afterwards.

    Example:
        >>> from qe_edge.models.loading import load_model
        >>> model = load_model("demo").model.get_decoder()
        >>> past, mask = {"0.key": torch.zeros(1, 1, 8, 64)}, torch.ones(1, 3, dtype=torch.int64)
        >>> with attending(model, CachedAttention(model.config, past, mask, pictures=(), expanded=False)):
        ...     model.config._attn_implementation
        'qe_edge_cached'
        >>> model.config._attn_implementation
        'sdpa'
    """
    configs: dict[int, tuple[Any, str]] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "_attn_implementation"):
            configs.setdefault(id(config), (config, config._attn_implementation))
    ALL_ATTENTION_FUNCTIONS[IMPLEMENTATION] = attention.attend
    try:
        for config, _ in configs.values():
            config._attn_implementation = IMPLEMENTATION
        yield
    finally:
        for config, implementation in configs.values():
            config._attn_implementation = implementation
        del ALL_ATTENTION_FUNCTIONS[IMPLEMENTATION]
