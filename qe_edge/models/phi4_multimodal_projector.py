"""Phi-4-multimodal's projections as one module, which transformers has as two layers of a larger one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu
from transformers.models.phi4_multimodal.modeling_phi4_multimodal import Phi4MultimodalImageEmbedding

PROJECTIONS = ("img_projection_up", "img_projection_down")
ATTENTION = "Phi4MultimodalVisionAttention"


class Projector(nn.Module):
    """The two projections of a `Phi4MultimodalImageEmbedding`, under the names that they have there.

    Example:
        >>> from types import SimpleNamespace
        >>> layers = {"img_projection_up": nn.Linear(8, 12), "img_projection_down": nn.Linear(12, 12)}
        >>> tuple(Projector(SimpleNamespace(**layers))(torch.zeros(1, 5, 8)).shape)
        (1, 5, 12)
    """

    def __init__(self, embedding: Any) -> None:  # noqa: ANN401 - transformers' own class
        super().__init__()
        for name in PROJECTIONS:
            setattr(self, name, getattr(embedding, name))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Tokens `[1, tokens, width]` to features `[1, tokens, hidden]`."""
        up, down = (self.get_submodule(name) for name in PROJECTIONS)
        features: Tensor = down(gelu(up(hidden_states)))
        return features


class ProjectedEmbedding(Phi4MultimodalImageEmbedding):
    """transformers' own, which projects all pictures in one call of one module; it computes the same.

    The module is no child, so that tensors keep their names. It has the projections that its owner has at any time.

    Example:
        >>> from transformers import Phi4MultimodalConfig, Phi4MultimodalForCausalLM
        >>> few = {"num_hidden_layers": 1, "vision_config": {"num_hidden_layers": 1}, "audio_config": {"num_blocks": 1}}
        >>> with torch.device("meta"):
        ...     model = Phi4MultimodalForCausalLM(Phi4MultimodalConfig(**few))
        >>> name, projector = projector_of(model)
        >>> model.get_submodule(name).img_projection_up = nn.Identity()
        >>> projector.img_projection_up
        Identity()
    """

    def __setattr__(self, name: str, value: Any) -> None:  # noqa: ANN401 - as torch's own
        super().__setattr__(name, value)
        if name in PROJECTIONS:
            setattr(self.__dict__["projector"], name, value)

    def forward(  # type: ignore[override] # all of its arguments are there
        self,
        input_ids: Tensor,
        inputs_embeds: Tensor,
        image_pixel_values: Tensor,
        image_sizes: Tensor,
        image_attention_mask: Tensor,
    ) -> Tensor:
        """`inputs_embeds` with the features of all pictures, as transformers puts them there."""
        width, shape, crop = self.image_dim_out, image_pixel_values.shape[:2], self.crop_size
        pixels = image_pixel_values.flatten(0, 1).to(self.img_processor.embeddings.patch_embedding.weight.dtype)
        features = self.get_img_features(pixels, attention_mask=image_attention_mask.flatten(0, 1).bool())
        side = round(features.shape[1] ** 0.5)
        crops, tokens = features.reshape(*shape, side, side, width), []
        for picture, mask, (height, across) in zip(crops, image_attention_mask, image_sizes.tolist(), strict=True):
            rows, columns = height // crop, across // crop
            end = 1 + rows * columns
            grid = picture[1:end].reshape(rows, columns, side, side, width).transpose(1, 2)
            used = mask[1:end, ::2, ::2].reshape(rows, columns, side, side).transpose(1, 2)
            used = used.reshape(rows * side, columns * side)
            grid = grid.reshape(rows * side, columns * side, width)[: int(used[:, 0].sum()), : int(used[0].sum())]
            tokens += [self._lines(grid), self.global_img_feature_extensor[0], self._lines(picture[0])]
        together = torch.cat(tokens).unsqueeze(0).to(self.img_projection_up.bias.dtype)
        projected: Tensor = self.__dict__["projector"](together)
        vision: Any = self.config.vision_config
        places = (input_ids == vision.image_token_id).nonzero(as_tuple=True)
        embeds: Tensor = self.drop(inputs_embeds.index_put(places, projected.squeeze(0).to(inputs_embeds.dtype)))
        return embeds

    def _lines(self, grid: Tensor) -> Tensor:
        """Tokens `[height, width, channels]` line by line, each line with its end."""
        end = self.sub_img_feature_extensor[0].expand(len(grid), 1, -1)
        return torch.cat([grid, end], dim=1).flatten(0, 1)


def projector_of(model: nn.Module) -> tuple[str, nn.Module]:
    """Path of a model's `Phi4MultimodalImageEmbedding`, and its projections as one module that it calls once.

    Example:
        >>> from transformers import Phi4MultimodalConfig, Phi4MultimodalForCausalLM
        >>> few = {"num_hidden_layers": 1, "vision_config": {"num_hidden_layers": 1}, "audio_config": {"num_blocks": 1}}
        >>> with torch.device("meta"):
        ...     model = Phi4MultimodalForCausalLM(Phi4MultimodalConfig(**few))
        >>> name, projector = projector_of(model)
        >>> name, [part for part, _ in projector.named_children()]
        ('model.embed_tokens_extend.image_embed', ['img_projection_up', 'img_projection_down'])
    """
    name, embedding = next(
        (name, module) for name, module in model.named_modules() if isinstance(module, Phi4MultimodalImageEmbedding)
    )
    if not isinstance(embedding, ProjectedEmbedding):
        embedding.__dict__["projector"] = Projector(embedding)
        embedding.__class__ = ProjectedEmbedding
    projector: nn.Module = embedding.__dict__["projector"]
    return name, projector


def see_whole_crops(model: nn.Module) -> None:
    """Let no attention of the vision encoder be causal.

    Example:
        >>> from transformers import Phi4MultimodalConfig, Phi4MultimodalForCausalLM
        >>> few = {"num_hidden_layers": 1, "vision_config": {"num_hidden_layers": 1}, "audio_config": {"num_blocks": 1}}
        >>> with torch.device("meta"):
        ...     model = Phi4MultimodalForCausalLM(Phi4MultimodalConfig(**few))
        >>> see_whole_crops(model)
        >>> [module.is_causal for module in model.modules() if type(module).__name__ == ATTENTION]
        [False]
    """
    for module in model.modules():
        if type(module).__name__ == ATTENTION:
            module.is_causal = False  # type: ignore[assignment] # transformers' own class
