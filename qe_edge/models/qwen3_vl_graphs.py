"""Qwen3-VL's visual encoder, its mergers, and its decoder, to whose first layers the features of earlier blocks go."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qe_edge.models import qwen_vl_graphs
from qe_edge.models.decoder import Decoder, decoder_graph
from qe_edge.models.family import GraphSpec
from qe_edge.models.qwen_vl_graphs import EXAMPLE, per_group, run_block


class TappedEncoder(qwen_vl_graphs.PatchEncoder):
    """Patch embedding and vision blocks of a `Qwen3VLVisionModel`, for one picture."""

    def __init__(self, visual: Any) -> None:  # noqa: ANN401 - transformers' own class
        super().__init__(visual)
        self.pos_embed = visual.pos_embed
        self.taps = list(getattr(visual, "deepstack_visual_indexes", ()))  # Qwen3.5 has none

    def forward(  # type: ignore[override] # it takes more
        self, pixel_values: Tensor, position_ids: Tensor, grid_points: Tensor, grid_weights: Tensor
    ) -> Tensor:
        """Hidden states `[groups, patches of a group, (1 + taps) * width]`: of the last block, then of the tapped ones.

        Args:
            pixel_values: As for `PatchEncoder`.
            position_ids: As for `PatchEncoder`.
            grid_points: `[groups, patches of a group, 4]` int64, learnt positions around a patch.
            grid_weights: `[groups, patches of a group, 4]`, their weights.
        """
        pos_embed: Any = self.pos_embed
        stretched = (pos_embed(grid_points) * grid_weights[..., None]).sum(2)
        hidden = self.embed(pixel_values) + stretched.flatten(0, 1).unsqueeze(0)
        rotary = self.rotary(hidden, position_ids)
        tapped: dict[int, Tensor] = {}
        blocks: Any = self.blocks
        for number, block in enumerate(blocks):
            hidden = run_block(block, hidden, rotary)
            if number in self.taps:
                tapped[number] = hidden
        return self.grouped(torch.cat([hidden, *(tapped[tap] for tap in self.taps)], dim=-1))


class Mergers(nn.Module):
    """The merger of a `Qwen3VLVisionModel` and those of its tapped blocks; linear layers see rank 3."""

    def __init__(self, visual: Any) -> None:  # noqa: ANN401 - transformers' own class
        super().__init__()
        self.merger = visual.merger
        self.deepstack_merger_list = getattr(visual, "deepstack_merger_list", nn.ModuleList())

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[groups, patches of a group, (1 + taps) * width]` to features `[groups, (1 + taps) * hidden]`."""
        further: Any = self.deepstack_merger_list
        mergers = [self.merger, *further]
        parts = hidden_states.chunk(len(mergers), dim=-1)
        return torch.cat([merge(merger, part) for merger, part in zip(mergers, parts, strict=True)], dim=-1)


def merge(merger: Any, hidden: Tensor) -> Tensor:  # noqa: ANN401 - transformers' own class
    """A `Qwen3VLVisionPatchMerger` on `[groups, patches of a group, width]`; returns `[groups, hidden]`."""
    joined = (1, -1, merger.hidden_size)
    normed = merger.norm(hidden.reshape(joined)) if merger.use_postshuffle_norm else merger.norm(hidden).reshape(joined)
    merged: Tensor = merger.linear_fc2(merger.act_fn(merger.linear_fc1(normed)))
    return merged.squeeze(0)


class DeepstackDecoder(Decoder):
    """A `Qwen3VLTextModel` whose `inputs_embeds` `[batch, sequence, (1 + taps) * hidden]` hold what is added deeper.

    Args:
        model: The text model.
        head: Projection to the vocabulary.
        taps: After how many of the first layers something is added.
    """

    def __init__(self, model: nn.Module, head: nn.Module, taps: int) -> None:
        super().__init__(model, head)
        self.width = (1 + taps) * self.width

    def hidden_states(self, inputs_embeds: Tensor, **inputs: Any) -> Any:  # noqa: ANN401 - transformers' output
        """The text model's output; where there is no picture, 0 is added."""
        config: Any = self.model.config
        embeds, *added = torch.split(inputs_embeds, config.hidden_size, dim=-1)
        # transformers adds at the places of pictures alone, which depends on data
        self.model.__dict__["_deepstack_process"] = lambda hidden, _places, features: hidden + features
        try:
            return self.model(inputs_embeds=embeds, visual_pos_masks=embeds, deepstack_visual_embeds=added, **inputs)
        finally:
            del self.model.__dict__["_deepstack_process"]


def graphs(model: Any) -> list[GraphSpec]:  # noqa: ANN401 - transformers' own class
    """All graphs of a model."""
    by_class = {type(module).__name__: module for module in model.modules()}
    visual, text = by_class["Qwen3VLVisionModel"], by_class["Qwen3VLTextModel"]
    decoder = DeepstackDecoder(text, model.get_output_embeddings(), len(visual.deepstack_merger_list))
    return [visual_graph(visual), merger_graph(visual), decoder_graph(decoder, position_axes=3)]


def visual_graph(visual: Any) -> GraphSpec:  # noqa: ANN401 - transformers' own class
    """The graph "visual"."""
    patches = visual.spatial_merge_size**2
    further = {
        "grid_points": per_group(torch.zeros(EXAMPLE, patches, 4, dtype=torch.int64)),
        "grid_weights": per_group(torch.zeros(EXAMPLE, patches, 4)),
    }
    return qwen_vl_graphs.visual_graph(TappedEncoder(visual), further)


def merger_graph(visual: Any) -> GraphSpec:  # noqa: ANN401 - transformers' own class
    """The graph "merger"."""
    mergers = Mergers(visual)
    width = (1 + len(mergers.deepstack_merger_list)) * visual.config.hidden_size
    return qwen_vl_graphs.merger_graph(mergers, visual.spatial_merge_size**2, width)
