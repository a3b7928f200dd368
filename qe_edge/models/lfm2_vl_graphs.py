"""LFM2-VL's vision encoder and projector as modules for images of any size."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from qe_edge.models.decoder import Decoder, decoder_graph
from qe_edge.models.family import GraphSpec
from qe_edge.models.siglip_graphs import run_layer

MAX_IMAGES, LARGEST = 10, 1 << 16  # tiles of engines; of any dynamic size at export time
EXAMPLE = 6  # tokens to trace with

Size = tuple[int, ...]


class GridEncoder(nn.Module):
    """Patches with stretched positions, encoder layers and last norm of a `Siglip2VisionModel`.

    Args:
        vision: The model.
        together: Patches of a token.
    """

    def __init__(self, vision: Any, together: int) -> None:  # noqa: ANN401 - transformers' own class
        super().__init__()
        self.patch_embedding = vision.embeddings.patch_embedding
        self.position_embedding = vision.embeddings.position_embedding
        self.layers = vision.encoder.layers
        self.norm = vision.post_layernorm
        self.together = together

    def forward(self, pixel_values: Tensor, point_weights: Tensor) -> Tensor:
        """Hidden states `[tokens of all images, patches of a token, width]`.

        Args:
            pixel_values: `[images, patches, channels * height * width]`, patches of a token together.
            point_weights: `[1, patches, points]`, weights of the learnt positions.
        """
        learnt: Any = self.position_embedding.weight
        hidden = self.patch_embedding(pixel_values) + point_weights @ learnt
        layers: Any = self.layers
        for layer in layers:
            hidden = run_layer(layer, hidden)
        patches: Tensor = self.norm(hidden).reshape(-1, self.together, hidden.shape[-1])
        return patches


class Projector(nn.Module):
    """A `Lfm2VlMultiModalProjector` on tokens whose patches stand together; its linear layers see rank 3."""

    def __init__(self, projector: Any) -> None:  # noqa: ANN401 - transformers' own class
        super().__init__()
        self.layer_norm = projector.layer_norm if projector.use_layer_norm else nn.Identity()
        self.linear_1, self.act, self.linear_2 = projector.linear_1, projector.act, projector.linear_2

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Patches `[tokens, patches of a token, width]` to features `[tokens, hidden]`."""
        joined = self.layer_norm(hidden_states.flatten(1).unsqueeze(0))
        features: Tensor = self.linear_2(self.act(self.linear_1(joined)))
        return features.squeeze(0)


def project_once(model: Any) -> None:  # noqa: ANN401 - transformers' own class
    """Let a model project the tokens of all images in one call, as one image of a token's height; computes the same."""
    inner = next(module for module in model.modules() if type(module).__name__ == "Lfm2VlModel")
    inner.__dict__["get_image_features"] = MethodType(_image_features, inner)  # a copied model calls its own parts


def _image_features(
    self: Any,  # noqa: ANN401 - transformers' own class
    pixel_values: Tensor,
    spatial_shapes: Tensor,
    pixel_attention_mask: Tensor,
    **_further: object,
) -> Any:  # noqa: ANN401 - transformers' output
    """`Lfm2VlModel.get_image_features` with one call of the projector."""
    found = self.vision_tower(
        pixel_values=pixel_values, spatial_shapes=spatial_shapes, pixel_attention_mask=pixel_attention_mask
    )
    side, lines = self.multi_modal_projector.factor, []
    for hidden, (rows, columns) in zip(found.last_hidden_state, spatial_shapes.tolist(), strict=True):
        image = hidden[: rows * columns].reshape(rows // side, side, columns, -1)
        lines.append(image.transpose(0, 1).flatten(1, 2))  # lines of tokens, one behind the other
    features = self.multi_modal_projector(torch.cat(lines, dim=1).unsqueeze(0))
    found.pooler_output = [features.reshape(-1, features.shape[-1])]
    return found


def graphs(model: Any) -> list[GraphSpec]:  # noqa: ANN401 - transformers' own class
    """All graphs of a model."""
    by_class = {type(module).__name__: module for module in model.modules()}
    vision, projector = by_class["Siglip2VisionModel"], by_class["Lfm2VlMultiModalProjector"]
    text = by_class["Lfm2VlModel"].language_model
    return [
        visual_graph(vision, projector.factor**2),
        merger_graph(projector, vision.config.hidden_size),
        decoder_graph(Decoder(text, model.get_output_embeddings())),
    ]


def visual_graph(vision: Any, together: int) -> GraphSpec:  # noqa: ANN401 - transformers' own class
    """The graph "visual" for images of one size, in patches."""
    points, values = vision.config.num_patches, vision.embeddings.patch_embedding.in_features
    tokens = Dim("tokens", min=1, max=LARGEST)
    patches = EXAMPLE * together

    def shapes(images: int, count: int) -> dict[str, Size]:
        return {"pixel_values": (images, count, values), "point_weights": (1, count, points)}

    smallest, typical, largest = shapes(1, together), shapes(1, points), shapes(MAX_IMAGES, 4 * points)
    return GraphSpec(
        name="visual",
        module=GridEncoder(vision, together),
        inputs=(torch.zeros(2, patches, values), torch.zeros(1, patches, points)),
        input_names=["pixel_values", "point_weights"],
        output_names=["hidden_states"],
        dynamic_shapes=({0: Dim("images", min=1, max=LARGEST), 1: together * tokens}, {1: together * tokens}),
        profiles={"default": {name: (smallest[name], typical[name], largest[name]) for name in smallest}},
    )


def merger_graph(projector: Any, width: int) -> GraphSpec:  # noqa: ANN401 - transformers' own class
    """The graph "merger" over hidden states `[tokens, patches of a token, width]`."""
    shape = (projector.factor**2, width)
    sizes = ((1, *shape), (256, *shape), (256 * (MAX_IMAGES + 1), *shape))
    return GraphSpec(
        name="merger",
        module=Projector(projector),
        inputs=(torch.zeros(EXAMPLE, *shape),),
        input_names=["hidden_states"],
        output_names=["image_features"],
        dynamic_shapes=({0: Dim("tokens", min=1, max=LARGEST)},),
        profiles={"default": {"hidden_states": sizes}},
    )
