"""MiniCPM-V 4.6's vision encoder and merger as modules for images of any size."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn.functional import linear

from qe_edge.models.decoder import Decoder, decoder_graph
from qe_edge.models.family import GraphSpec
from qe_edge.models.placed_features import embeds_with
from qe_edge.models.siglip_graphs import attended, run_layer

MAX_IMAGES, LARGEST = 10, 1 << 16  # slices and the whole picture, of engines; of any dynamic size at export time
TYPICAL = 1024  # patches of a slice
JOINED = 4  # patches of a window, and windows of a token
EXAMPLE = 6  # tokens to trace with

Size = tuple[int, ...]


class SliceEncoder(nn.Module):
    """Patches with learnt positions, encoder layers and last norm of a `MiniCPMV4_6VisionModel`.

    Args:
        vision: The model.
        windows: Whether the patches of a window become one after the layer that the configuration names.
    """

    def __init__(self, vision: Any, *, windows: bool) -> None:  # noqa: ANN401 - transformers' own class
        super().__init__()
        embeddings = vision.embeddings
        self.patch_embedding = embeddings.patch_embedding
        self.position_embedding = embeddings.position_embedding
        self.side = embeddings.num_patches_per_side
        # transformers' own bounds, rounded as torch does on this machine: a patch on a bound may have its neighbour's
        self.bounds = nn.Buffer(torch.arange(1 / self.side, 1.0, 1 / self.side))
        self.layers = vision.encoder.layers
        self.joining = vision.vit_merger if windows else None
        self.joins_after = vision.config.insert_layer_id
        self.norm = vision.post_layernorm

    def forward(self, pixel_values: Tensor, places: Tensor) -> Tensor:
        """Hidden states `[tokens of all images, patches of a token, width]`.

        Args:
            pixel_values: `[images, patches, channels * height * width]`, patches of a token together.
            places: `[1, patches, 2]`, where a patch begins, as shares of the image's height and width.
        """
        patch, learnt, layers = (getattr(self, name) for name in ("patch_embedding", "position_embedding", "layers"))
        bucket = (places.unsqueeze(-1) >= self.bounds).to(torch.int64).sum(-1)
        hidden = linear(pixel_values, patch.weight.flatten(1), patch.bias)
        hidden = hidden + learnt.weight[bucket[..., 0] * self.side + bucket[..., 1]]
        for number, layer in enumerate(layers):
            hidden = run_layer(layer, hidden)
            if self.joining is not None and number == self.joins_after:
                hidden = joined_windows(self.joining, hidden)
        patches: Tensor = self.norm(hidden).reshape(-1, JOINED, hidden.shape[-1])
        return patches


def joined_windows(joining: Any, hidden: Tensor) -> Tensor:  # noqa: ANN401 - transformers' own class
    """A `MiniCPMV4_6ViTWindowAttentionMerger` on patches that stand together.

    Args:
        joining: The module.
        hidden: `[images, patches, width]`.

    Returns:
        `[images, patches / 4, width]`.
    """
    images, width = hidden.shape[0], hidden.shape[2]
    windows = hidden.reshape(-1, JOINED, width)
    windows = windows + attended(joining.self_attn, joining.layer_norm1(windows))
    mean = windows.mean(dim=1).reshape(images, -1, width)
    joined = joining.pre_norm(windows.reshape(images, -1, JOINED * width))
    output: Tensor = joining.linear_2(joining.act(joining.linear_1(joined))) + mean
    return output


class Merger(nn.Module):
    """A `MiniCPMV4_6DownsampleMLP` on tokens whose patches stand together; its linear layers see rank 3."""

    def __init__(self, layers: Any) -> None:  # noqa: ANN401 - transformers' own class
        super().__init__()
        self.pre_norm, self.act = layers.pre_norm, layers.act
        self.linear_1, self.linear_2 = layers.linear_1, layers.linear_2

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Patches `[tokens, patches of a token, width]` to features `[tokens, hidden]`."""
        joined = self.pre_norm(hidden_states.flatten(1).unsqueeze(0))
        features: Tensor = self.linear_2(self.act(self.linear_1(joined)))
        return features.squeeze(0)


def see_at_once(model: Any) -> None:  # noqa: ANN401 - transformers' own class
    """Let a model call its layers once for pictures, videos and all of their images; it computes the same."""
    by_class = {type(module).__name__: module for module in model.modules()}
    inner, merger = by_class["MiniCPMV4_6Model"], by_class["MiniCPMV4_6Merger"]
    inner.__dict__["forward"] = MethodType(_forward, inner)  # a copied model calls its own parts
    merger.__dict__["forward"] = MethodType(_merged, merger)


def _forward(
    self: Any,  # noqa: ANN401 - transformers' own class
    *,
    input_ids: Any = None,  # noqa: ANN401 - a tensor
    pixel_values: Tensor | None = None,
    target_sizes: Any = None,  # noqa: ANN401 - as above
    pixel_values_videos: Tensor | None = None,
    target_sizes_videos: Any = None,  # noqa: ANN401 - as above
    **options: Any,  # noqa: ANN401 - transformers' own
) -> Any:  # noqa: ANN401
    """`MiniCPMV4_6Model.forward`; where there are pictures and videos, their features are put in here."""
    if pixel_values is None or pixel_values_videos is None:
        shown = {"pixel_values": pixel_values, "target_sizes": target_sizes, "input_ids": input_ids}
        shown |= {"pixel_values_videos": pixel_values_videos, "target_sizes_videos": target_sizes_videos}
        return type(self).forward(self, **shown, **options)
    pixels, sizes = torch.cat([pixel_values, pixel_values_videos], -1), torch.cat([target_sizes, target_sizes_videos])
    found = self.get_image_features(pixels, sizes, downsample_mode=options.pop("downsample_mode", None)).pooler_output
    parts = {
        self.config.image_token_id: found[: len(target_sizes)],
        self.config.video_token_id: found[len(target_sizes) :],
    }
    features = {token: torch.cat(list(images)) for token, images in parts.items()}
    return type(self).forward(self, **{**options, "inputs_embeds": embeds_with(self, input_ids, features)})


def _merged(self: Any, hidden_states: Tensor, target_sizes: Tensor) -> list[Tensor]:  # noqa: ANN401
    """`MiniCPMV4_6Merger.forward` with one call of its layers: features `[tokens, hidden]` of every image."""
    sizes = target_sizes.tolist()
    images = torch.split(hidden_states[0], [rows * columns for rows, columns in sizes])
    tokens = [
        image.reshape(rows // 2, 2, columns // 2, 2, -1).transpose(1, 2).flatten(0, 1).flatten(1)
        for image, (rows, columns) in zip(images, sizes, strict=True)
    ]
    features: Tensor = self.mlp[0](torch.cat(tokens))
    return list(torch.split(features, [len(image) for image in tokens]))


def graphs(model: Any, *, windows: bool) -> list[GraphSpec]:  # noqa: ANN401 - transformers' own class
    """All graphs of a model; `windows` as for `SliceEncoder`."""
    by_class = {type(module).__name__: module for module in model.modules()}
    vision, merger = by_class["MiniCPMV4_6VisionModel"], by_class["MiniCPMV4_6DownsampleMLP"]
    text = by_class["MiniCPMV4_6Model"].language_model
    return [
        visual_graph(SliceEncoder(vision, windows=windows), JOINED**2 if windows else JOINED),
        merger_graph(Merger(merger), vision.config.hidden_size),
        decoder_graph(Decoder(text, model.get_output_embeddings())),
    ]


def visual_graph(module: SliceEncoder, together: int) -> GraphSpec:
    """The graph "visual" for images of one size, in patches of which `together` become a token."""
    weight: Any = module.patch_embedding.weight
    values, patches = weight[0].numel(), EXAMPLE * together
    tokens = Dim("tokens", min=1, max=LARGEST)

    def shapes(images: int, count: int) -> dict[str, Size]:
        return {"pixel_values": (images, count, values), "places": (1, count, 2)}

    smallest, typical, largest = shapes(1, together), shapes(1, TYPICAL), shapes(MAX_IMAGES, 2 * TYPICAL)
    return GraphSpec(
        name="visual",
        module=module,
        inputs=(torch.zeros(2, patches, values), torch.zeros(1, patches, 2)),
        input_names=["pixel_values", "places"],
        output_names=["hidden_states"],
        dynamic_shapes=({0: Dim("images", min=1, max=LARGEST), 1: together * tokens}, {1: together * tokens}),
        profiles={"default": {name: (smallest[name], typical[name], largest[name]) for name in smallest}},
    )


def merger_graph(module: Merger, width: int) -> GraphSpec:
    """The graph "merger" over hidden states `[tokens, patches of a token, width]`."""
    shape, most = (JOINED, width), MAX_IMAGES * TYPICAL // JOINED
    return GraphSpec(
        name="merger",
        module=module,
        inputs=(torch.zeros(EXAMPLE, *shape),),
        input_names=["hidden_states"],
        output_names=["image_features"],
        dynamic_shapes=({0: Dim("tokens", min=1, max=LARGEST)},),
        profiles={"default": {"hidden_states": ((1, *shape), (TYPICAL // JOINED**2, *shape), (most, *shape))}},
    )
