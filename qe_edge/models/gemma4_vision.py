"""Gemma 4's vision encoder for one picture, with its pooling, and the graph of what it hands on."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn.functional import embedding
from transformers.models.gemma4.modeling_gemma4 import apply_multidimensional_rope

from qe_edge.models.family import GraphSpec
from qe_edge.models.picture_attention import attend_all

SOFT_TOKENS = 280  # of a picture in engines, as released image processors have them
TYPICAL_TOKENS = 256
LARGEST = 1 << 18  # groups of patches at export time
BOUNDS = ("input_min", "input_max", "output_min", "output_max")
EXAMPLE = 4  # groups to trace with; not 1, which torch would take for a constant


class PooledEncoder(nn.Module):
    """A `Gemma4VisionModel` for one picture without padding, whose patches come in the groups that it pools.

    Example:
        >>> from transformers.models.gemma4.modeling_gemma4 import Gemma4VisionConfig, Gemma4VisionModel
        >>> config = Gemma4VisionConfig(num_hidden_layers=1, use_clipped_linears=True)
        >>> PooledEncoder(Gemma4VisionModel(config)).bounds["encoder.layers.0.mlp.up_proj"]  # of inputs and outputs
        (-inf, inf, -inf, inf)
    """

    def __init__(self, vision: Any) -> None:  # noqa: ANN401 - transformers' own class
        super().__init__()
        self.vision = vision
        # as numbers: torch's exporter writes no valid graph for bounds that are tensors
        self.bounds = {
            name: tuple(float(getattr(module, bound)) for bound in BOUNDS)
            for name, module in vision.named_modules()
            if getattr(module, "use_clipped_linears", False)
        }

    def forward(self, pixel_values: Tensor, position_ids: Tensor) -> Tensor:
        """Soft tokens `[groups, width]`.

        Args:
            pixel_values: `[groups, patches of a group, channels * height * width]`, from 0 to 1.
            position_ids: `[groups, patches of a group, 2]`, column and row of every patch.
        """
        vision: Any = self.vision
        groups, patches = pixel_values.shape[:2]
        places = position_ids.flatten(0, 1).unsqueeze(0)
        hidden = self._embed(2 * (pixel_values.flatten(0, 1).unsqueeze(0) - 0.5), places)
        cos, sin = vision.encoder.rotary_emb(hidden, places)
        for number, layer in enumerate(vision.encoder.layers):
            hidden = self._layer(f"encoder.layers.{number}", layer, hidden, (cos, sin), places)
        pooled: Tensor = hidden.view(groups, patches, -1).mean(1) * vision.pooler.root_hidden_size
        if vision.config.standardize:
            pooled = (pooled - vision.std_bias) * vision.std_scale
        return pooled

    def _embed(self, pixels: Tensor, places: Tensor) -> Tensor:
        embedder: Any = self.vision.patch_embedder
        columns, rows = (embedding(places[..., axis], embedder.position_embedding_table[axis]) for axis in range(2))
        hidden: Tensor = embedder.input_proj(pixels) + (columns + rows)
        return hidden

    def _layer(
        self,
        name: str,
        layer: Any,  # noqa: ANN401 - transformers' own class
        hidden: Tensor,
        rotary: tuple[Tensor, Tensor],
        places: Tensor,
    ) -> Tensor:
        """A `Gemma4VisionEncoderLayer` on `[1, patches, width]`; all patches see each other."""
        attention, mlp = layer.self_attn, layer.mlp
        x = layer.input_layernorm(hidden)
        shape = (*x.shape[:2], -1, attention.head_dim)
        query, key, value = (self._linear(f"{name}.self_attn.{part}_proj", x).reshape(shape) for part in "qkv")
        query, key = (
            apply_multidimensional_rope(part, *rotary, places)
            for part in (attention.q_norm(query), attention.k_norm(key))
        )
        key, value = (
            part.repeat_interleave(attention.num_key_value_groups, dim=2) for part in (key, attention.v_norm(value))
        )
        mixed = self._linear(f"{name}.self_attn.o_proj", attend_all(query, key, value, attention.scaling))
        hidden = hidden + layer.post_attention_layernorm(mixed)
        x = layer.pre_feedforward_layernorm(hidden)
        gate, up = (self._linear(f"{name}.mlp.{part}_proj", x) for part in ("gate", "up"))
        down = self._linear(f"{name}.mlp.down_proj", mlp.act_fn(gate) * up)
        output: Tensor = hidden + layer.post_feedforward_layernorm(down)
        return output

    def _linear(self, name: str, x: Tensor) -> Tensor:
        """A `Gemma4ClippableLinear`."""
        lowest, highest, *outputs = self.bounds.get(name, (-math.inf, math.inf, -math.inf, math.inf))
        module: Any = self.vision.get_submodule(name)
        return _clipped(module.linear(_clipped(x, lowest, highest)), *outputs)


def _clipped(x: Tensor, lowest: float, highest: float) -> Tensor:
    return x if (lowest, highest) == (-math.inf, math.inf) else x.clamp(lowest, highest)


def visual_graph(vision: Any) -> GraphSpec:  # noqa: ANN401 - transformers' own class
    """The graph "visual".

    Example:
        >>> from transformers.models.gemma4.modeling_gemma4 import Gemma4VisionConfig, Gemma4VisionModel
        >>> graph = visual_graph(Gemma4VisionModel(Gemma4VisionConfig(num_hidden_layers=1)))
        >>> graph.profiles["default"]["pixel_values"][2]  # the largest picture of an engine: groups, patches, values
        (280, 9, 768)
    """
    patches = vision.config.pooling_kernel_size**2
    inputs = {
        "pixel_values": torch.zeros(EXAMPLE, patches, vision.patch_embedder.input_proj.in_features),
        "position_ids": torch.zeros(EXAMPLE, patches, 2, dtype=torch.int64),
    }
    return _graph("visual", PooledEncoder(vision), inputs, "hidden_states")


def merger_graph(projection: nn.Module, width: int) -> GraphSpec:
    """The graph "merger" over soft tokens `[groups, width]`.

    Example:
        >>> merger_graph(nn.Linear(64, 32), width=64).profiles["default"]["hidden_states"]
        ((1, 64), (256, 64), (280, 64))
    """
    return _graph("merger", projection, {"hidden_states": torch.zeros(EXAMPLE, width)}, "image_features")


def _graph(name: str, module: nn.Module, inputs: dict[str, Tensor], output: str) -> GraphSpec:
    """A graph whose inputs count groups along their first axis."""
    groups = Dim("groups", min=1, max=LARGEST)
    sizes = (1, TYPICAL_TOKENS, SOFT_TOKENS)
    return GraphSpec(
        name=name,
        module=module,
        inputs=tuple(inputs.values()),
        input_names=list(inputs),
        output_names=[output],
        dynamic_shapes=tuple({0: groups} for _ in inputs),
        profiles={"default": {key: _triple(sizes, value) for key, value in inputs.items()}},
    )


def _triple(sizes: tuple[int, int, int], example: Tensor) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    smallest, typical, largest = ((size, *example.shape[1:]) for size in sizes)
    return smallest, typical, largest
