"""pi0's graphs: SigLIP, the projection, what Gemma keeps of a prompt, a step of the action expert; and its calibration.

The expert is a second Gemma with layers as many as the first one's. A layer of it attends to the keys and values that
the first one's layer has of the prompt, and to its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from qe_edge.models.family import Encoded, GraphSpec, ModelFamily, Profile
from qe_edge.models.gemma3_graphs import merger_graph, visual_graph
from qe_edge.models.robot import times
from qe_edge.system.device import CPU

MAX_BATCH = 4  # of engines; ONNX Runtime takes any
TYPICAL_PROMPT, MAX_PROMPT = 816, 2304  # three and eight cameras of 256 tokens, with a task
LARGEST = 1 << 20  # of any dynamic size at export time
KEPT = "prompt"  # what calibration keeps of a batch
HIDDEN = torch.finfo(torch.float32).min  # in a mask, of a token that is not seen; rows of padding stay finite


class Written:
    """Stands for a cache, and keeps the keys and values of a prompt; a layer that runs again leaves them anew.

    Attributes:
        layers: Key and value `[batch, kv_heads, prompt, head_dim]` by the number of the layer.
    """

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """As a layer of transformers calls it."""
        self.layers[layer] = (key.to(CPU), value.to(CPU))  # of all batches they would fill a GPU
        return key, value


class Read:
    """Stands for a cache that holds a prompt: the keys and values of new tokens follow it, and are not kept.

    Args:
        layers: As in `Written`; they may be written later.
        repeats: How many rows of new tokens read the same prompt.
    """

    def __init__(self, layers: dict[int, tuple[Tensor, Tensor]], repeats: int = 1) -> None:
        self.layers = layers
        self.repeats = repeats

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """As a layer of transformers calls it."""
        past = [part.to(key.device) for part in self.layers[layer]]
        if self.repeats > 1:
            past = [part.repeat_interleave(self.repeats, 0) for part in past]
        return torch.cat([past[0], key], 2), torch.cat([past[1], value], 2)


class Prefix(nn.Module):
    """The language model over a prompt, whose tokens all see each other.

    Args:
        model: A `GemmaModel`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs_embeds: Tensor, position_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        """Key and value of every layer, `[batch, kv_heads, prompt, head_dim]`.

        Args:
            inputs_embeds: `[batch, prompt, width]`.
            position_ids: `[batch, prompt]` int64.
            attention_mask: `[batch, prompt]` int64, 0 on padding.
        """
        kept = Written()
        self.write(inputs_embeds, position_ids, attention_mask, kept)
        return tuple(part for layer in sorted(kept.layers) for part in kept.layers[layer])

    def write(self, inputs_embeds: Tensor, position_ids: Tensor, attention_mask: Tensor, kept: Written) -> None:
        """As `forward`; `kept` has the keys and values then."""
        mask = _hiding(attention_mask)[:, None, None].expand(-1, 1, attention_mask.shape[1], -1)
        self.model(
            inputs_embeds=inputs_embeds,
            position_ids=position_ids,
            attention_mask=mask,  # transformers keeps a mask of four axes as it is
            past_key_values=kept,
            use_cache=False,
        )


class ActionStep(nn.Module):
    """The action expert: the velocity of noisy actions at a time, given what was kept of a prompt.

    Args:
        model: A `PI0ForConditionalGeneration`.
    """

    def __init__(self, model: Any) -> None:  # noqa: ANN401 - transformers' own class
        super().__init__()
        self.expert = model.model.dit
        self.embed = model.embed_action_time
        self.head = model.action_out_proj

    def forward(
        self, state: Tensor, actions: Tensor, time: Tensor, attention_mask: Tensor, past: Sequence[Tensor]
    ) -> Tensor:
        """The velocity `[batch, chunk, action_dim]`.

        Args:
            state: `[batch, state_dim]`, normalized.
            actions: Noisy actions `[batch, chunk, action_dim]`.
            time: `[batch]`, 1 at pure noise and 0 at the actions.
            attention_mask: Of the prompt, `[batch, prompt]` int64, 0 on padding.
            past: As `Prefix` returns it.
        """
        layers = {number: (past[2 * number], past[2 * number + 1]) for number in range(len(past) // 2)}
        return self.velocity(state, actions, time, attention_mask, Read(layers))

    def velocity(self, state: Tensor, actions: Tensor, time: Tensor, attention_mask: Tensor, kept: Read) -> Tensor:
        """As `forward`, with one row of `attention_mask` for each of the others."""
        embeds = self._embeds(state, actions, time)
        tokens = embeds.shape[1]
        own = torch.zeros(tokens, tokens, device=embeds.device)
        own[0, 1:] = HIDDEN  # the state sees no action
        prompt = _hiding(attention_mask)[:, None].expand(-1, tokens, -1)
        mask = torch.cat([prompt, own[None].expand(prompt.shape[0], -1, -1)], 2)[:, None]
        places = attention_mask.sum(1, keepdim=True) + torch.arange(tokens, device=embeds.device)
        hidden = self.expert(
            inputs_embeds=embeds, position_ids=places, attention_mask=mask, past_key_values=kept, use_cache=False
        ).last_hidden_state
        velocity: Tensor = self.head(hidden[:, 1:])
        return velocity

    def _embeds(self, state: Tensor, actions: Tensor, time: Tensor) -> Tensor:
        """`[batch, 1 + chunk, width]`: the state, then the actions with the time; linear layers see rank 3."""
        embed = self.embed
        angles = embed.sinusoid_embeds.sinusoid_freq * time[:, None]
        moment = torch.cat([angles.sin(), angles.cos()], 1)[:, None].expand(-1, actions.shape[1], -1)
        inner = embed.action_time_mlp_in(torch.cat([embed.action_in_proj(actions), moment], 2))
        acting = embed.action_time_mlp_out(nn.functional.silu(inner))
        return torch.cat([embed.state_proj(state[:, None]), acting], 1)


def run_blocks(family: ModelFamily, model: Any, encoded: Encoded, kept: dict[str, Any]) -> None:  # noqa: ANN401
    """One forward pass in which every block runs once, on a batch that was encoded with its actions.

    The action expert sees every sample at all steps of denoising: at time t it reads t * noise + (1 - t) * actions, as
    it was trained to (Black et al. 2024, section IV). The steps are rows of one batch, so that the prompt is read once.

    Args:
        family: The model's family.
        model: A `PI0ForConditionalGeneration`.
        encoded: The batch.
        kept: The keys and values of its prompts: the blocks of the language model write them, and those of the action
            expert read them, perhaps in another pass.
    """
    written: Written = kept.setdefault(KEPT, Written())
    inputs = family.torch_inputs(encoded)
    mask = inputs["attention_mask"]
    embeds = model.model.embed_prefix(inputs["input_ids"], inputs["pixel_values"], inputs["pixel_attention_mask"])
    positions = torch.from_numpy(family.position_ids(encoded))
    Prefix(model.model.vlm.language_model).write(embeds, positions, mask, written)
    steps = times(model.config.num_inference_steps)
    noise, actions = (torch.from_numpy(encoded.pixels[name]) for name in ("noise", "actions"))
    moments = torch.from_numpy(steps).repeat(len(noise))
    at = moments[:, None, None]
    repeated = [_rows(part, len(steps)) for part in (inputs["state"], noise, actions, mask)]
    state, noise, actions, mask = repeated
    noisy = at * noise + (1 - at) * actions
    ActionStep(model).velocity(state, noisy, moments, mask, Read(written.layers, len(steps)))


def graphs(model: Any) -> list[GraphSpec]:  # noqa: ANN401 - transformers' own class
    """All graphs of a model."""
    by_class = {type(module).__name__: module for module in model.modules()}
    vision = by_class["SiglipVisionModel"]
    projector: Any = by_class["PaliGemmaMultiModalProjector"]
    return [
        visual_graph(vision),
        merger_graph(projector, vision),
        _prefix_graph(model),
        _action_graph(model),
    ]


def _prefix_graph(model: Any) -> GraphSpec:  # noqa: ANN401 - transformers' own class
    """The graph "prefix"."""
    text = model.model.vlm.language_model
    batch, prompt = 2, 5  # sizes of the example differ, and none is 0 or 1, which torch would take for constants
    rows, tokens = (Dim(name, min=1, max=LARGEST) for name in ("batch", "prompt"))
    # one tensor for each input: torch takes the same one for the same input
    positions, mask = (torch.ones(batch, prompt, dtype=torch.int64) for _ in range(2))
    shape = {0: rows, 1: tokens}
    profile = _profile({"inputs_embeds": (text.config.hidden_size,), "position_ids": (), "attention_mask": ()}, {})
    return GraphSpec(
        name="prefix",
        module=Prefix(text),
        inputs=(torch.zeros(batch, prompt, text.config.hidden_size), positions, mask),
        input_names=["inputs_embeds", "position_ids", "attention_mask"],
        output_names=[f"present.{name}" for name in _kept_names(text.config)],
        dynamic_shapes=(shape, shape, shape),
        profiles={"default": profile},
    )


def _action_graph(model: Any) -> GraphSpec:  # noqa: ANN401 - transformers' own class
    """The graph "action"."""
    config, expert = model.config, model.config.dit_config
    batch, prompt = 2, 5
    rows, tokens = (Dim(name, min=1, max=LARGEST) for name in ("batch", "prompt"))
    names = [f"past_key_values.{name}" for name in _kept_names(expert)]
    past = [torch.zeros(batch, expert.num_key_value_heads, prompt, expert.head_dim) for _ in names]
    own = {"state": (config.max_state_dim,), "actions": (config.chunk_size, config.max_action_dim), "time": ()}
    kept = dict.fromkeys(names, (expert.num_key_value_heads, expert.head_dim))
    return GraphSpec(
        name="action",
        module=ActionStep(model),
        inputs=(
            *(torch.zeros(batch, *sizes) for sizes in own.values()),
            torch.ones(batch, prompt, dtype=torch.int64),
            past,
        ),
        input_names=[*own, "attention_mask", *names],
        output_names=["velocity"],
        dynamic_shapes=({0: rows}, {0: rows}, {0: rows}, {0: rows, 1: tokens}, [{0: rows, 2: tokens}] * len(names)),
        profiles={"default": {**_fixed(own), **_profile({"attention_mask": ()}, kept)}},
    )


def _kept_names(config: Any) -> list[str]:  # noqa: ANN401 - transformers' configuration classes
    return [f"{layer}.{part}" for layer in range(config.num_hidden_layers) for part in ("key", "value")]


def _profile(tokens: dict[str, tuple[int, ...]], kept: dict[str, tuple[int, int]]) -> Profile:
    """Shapes `[batch, prompt, ...]` of `tokens` and `[batch, heads, prompt, width]` of `kept`."""
    sizes = ((1, 1), (1, TYPICAL_PROMPT), (MAX_BATCH, MAX_PROMPT))
    found = {name: tuple((*size, *rest) for size in sizes) for name, rest in tokens.items()}
    found |= {
        name: tuple((rows, heads, length, width) for rows, length in sizes) for name, (heads, width) in kept.items()
    }
    return found  # type: ignore[return-value] # three of three


def _fixed(own: dict[str, tuple[int, ...]]) -> Profile:
    return {name: ((1, *sizes), (1, *sizes), (MAX_BATCH, *sizes)) for name, sizes in own.items()}


def _hiding(attention_mask: Tensor) -> Tensor:
    """0 on tokens and the lowest number on padding, float32."""
    return (attention_mask == 0).to(torch.float32) * HIDDEN


def _rows(part: Tensor, count: int) -> Tensor:
    """Every row `count` times, one after the other."""
    return part.repeat_interleave(count, 0)
