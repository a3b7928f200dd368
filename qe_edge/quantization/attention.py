"""Watches the attention of a block: what an error of a query, a key or a value does to scores and outputs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qe_edge.calibration.statistics import CHUNK, GramMatrix
from qe_edge.models.family import Block
from qe_edge.models.streaming import Chain, run_block
from qe_edge.numerics.matrices import to_tensor
from qe_edge.quantization.walk import BlockWalk
from qe_edge.reconstruction.problem import HeadGrams
from qe_edge.system.errors import CommonNotice

LAYERS = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"))  # of a query, a key and a value
WATCHED, WATCHABLE = "qe_edge_watched", "sdpa"  # implementations of attention in transformers


def watch_attention(walk: BlockWalk, chain: Chain, position: int, block: Block) -> dict[str, HeadGrams]:
    """Matrices of the query, key and value layers of a block, by name; a notice where its attention is not seen.

    The block runs up to its attention, which transformers calls through one table for all families. It gets queries
    and keys as they meet there, after norms and rotary embeddings. An error of a layer's output is carried there by
    the derivative, whatever lies between.

    Args:
        walk: The walk that has come to the block, and made it ready.
        chain: The block's chain.
        position: The block's place in it.
        block: The block.

    Example:
        >>> from qe_edge.models.loading import load_model
        >>> from qe_edge.quantization.job import encoded_batches, make_job
        >>> from qe_edge.recipes.recipe import make_recipe
        >>> from qe_edge.system.device import CPU
        >>> recipe, loaded = make_recipe(method="aespa"), load_model("demo")
        >>> walk = BlockWalk(loaded, recipe.modules, encoded_batches(loaded, make_job("demo", recipe).samples[:1]), CPU)
        >>> chain, position, block = next(iter(walk))
        >>> with walk.original(block):
        ...     found = watch_attention(walk, chain, position, block)
        >>> [(name.rpartition(".")[2], heads.outputs is None, heads.count) for name, heads in found.items()]
        [('q_proj', False, 8), ('k_proj', False, 2), ('v_proj', True, 2)]
    """
    watched = {module: _Watched(module, layers) for module, layers in _attentions(block.module)}
    if watched:
        with walk.computing(block), _called(block.module, watched):
            for batch, hidden in enumerate(chain.hidden):
                valid = walk.valid_tokens(block, chain.batches[batch])
                for one in watched.values():
                    one.begin(valid)
                with suppress(_AllSeen):
                    run_block(block.module, hidden, chain.calls[position][batch], walk.device)
    found: dict[str, HeadGrams] = {}
    names = {module: name for name, module in block.module.named_modules()}
    for module, one in watched.items():
        parent = f"{block.name}.{names[module]}".rstrip(".")
        found |= {f"{parent}.{leaf}": heads for leaf, heads in one.finish().items()}
    if not found:
        what = "show no attention with a query, a key and a value layer of its own"
        warnings.warn(
            CommonNotice(f"Some blocks of '{block.group}' {what}: aespa rounds their layers as gptq."), stacklevel=2
        )
    return found


def attention_weights(query: Tensor, key: Tensor, scaling: float, mask: Tensor | None, *, causal: bool) -> Tensor:
    """The weights `[heads, tokens, keys]` of one sample's attention.

    Args:
        query: `[heads, tokens, width]`.
        key: `[kv_heads, keys, width]`; every key serves as many heads in a row as there are for one.
        scaling: Factor on the scores.
        mask: What is added to the scores, or which of them count if bool; broadcasts to `[heads, tokens, keys]`.
        causal: Whether a token sees no later one; only where there is no mask.

    Example:
        >>> attention_weights(torch.zeros(1, 2, 4), torch.zeros(1, 2, 4), 0.5, None, causal=True)
        tensor([[[1.0000, 0.0000],
                 [0.5000, 0.5000]]])
    """
    scores = query @ key.repeat_interleave(len(query) // len(key), 0).transpose(1, 2) * scaling
    if mask is None and causal:
        mask = torch.ones(scores.shape[1:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1).nan_to_num()  # a token that sees nothing is padding


def carried_gram(output: Tensor, source: Tensor, grams: Tensor, valid: Tensor) -> Tensor:
    """`sum_t J_t^T G J_t` of every head `[heads, width, width]` float64, J_t the derivative of `output` by `source`.

    Args:
        output: `[samples, heads, tokens, width]`, computed from `source` token by token and head by head.
        source: `[samples, tokens, heads * width]`, which asks for gradients.
        grams: `[samples, heads, width, width]` float64, symmetric and not negative.
        valid: `[samples, tokens]`, 1 on tokens that count.

    Example:
        >>> source = torch.ones(1, 3, 4, requires_grad=True)
        >>> output = 2 * source.view(1, 3, 2, 2).transpose(1, 2)
        >>> grams = torch.eye(2, dtype=torch.float64).expand(1, 2, 2, 2)
        >>> carried_gram(output, source, grams, torch.tensor([[1.0, 1.0, 0.0]]))[1]  # two tokens, 2 * 2 each
        tensor([[8., 0.],
                [0., 8.]], dtype=torch.float64)
    """
    samples, heads, tokens, width = output.shape
    values, vectors = torch.linalg.eigh(grams)
    roots = (vectors * values.clamp_min(0).sqrt().unsqueeze(-2)).to(output.dtype)  # G = roots roots^T
    total = torch.zeros(heads, width, width, dtype=torch.float64, device=output.device)
    for column in range(width):
        probe = roots[..., column].unsqueeze(2) * valid[:, None, :, None]
        (gradient,) = torch.autograd.grad(output, source, probe.expand_as(output), retain_graph=True)
        rows = gradient.reshape(samples * tokens, heads, width).transpose(0, 1)
        total += (rows.transpose(1, 2) @ rows).double()
    return total


class _AllSeen(Exception):  # noqa: N818 - control flow, not an error
    """Every attention of the block was seen; the rest of it need not run."""


@dataclass(frozen=True)
class _Layers:
    """The layers of an attention, with their names in it."""

    names: tuple[str, str, str]
    linears: tuple[nn.Linear, nn.Linear, nn.Linear]


class _Watched:
    """One attention of a block, batch by batch."""

    def __init__(self, module: nn.Module, layers: _Layers) -> None:
        self.module, self.layers = module, layers
        self.done = False
        self._valid: Tensor | None = None
        self._sources: dict[str, Tensor] = {}
        self._read: Tensor | None = None  # what the value layer reads
        self._query: Tensor | None = None
        self._key: Tensor | None = None
        self._outputs: list[GramMatrix] = []
        self._tokens = 0
        self._fits = True

    def begin(self, valid: Tensor | None) -> None:
        """A new batch, with its tokens that count."""
        self.done, self._valid = False, valid

    def kept(self, name: str, inputs: Tensor, output: Tensor) -> Tensor:
        """A layer's output, at which derivatives begin."""
        if name == self.layers.names[2]:
            self._read = inputs.detach()
            return output
        source: Tensor = output.detach().requires_grad_()
        self._sources[name] = source
        return source

    def see(self, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float, *, causal: bool) -> None:
        """Add a batch: queries and keys `[samples, heads, tokens, width]` as they meet."""
        self.done = True
        q_name, k_name, _ = self.layers.names
        sizes = [part.shape[1] * part.shape[3] for part in (query, key)]
        wanted = [linear.out_features for linear in self.layers.linears]
        read = self._read
        if (
            not self._fits
            or read is None
            or read.dim() != 3
            or [*sizes, sizes[1]] != wanted
            or {q_name, k_name} != self._sources.keys()
            or any((len(part), part.shape[2]) != read.shape[:2] for part in (query, key))
        ):  # a gate beside the query, keys of another layer, pictures that are attended to one by one
            self._fits = False
            return
        there = torch.ones(read.shape[:2]) if self._valid is None else self._valid.float()
        valid = there.to(query.device)
        self._scores(query, key, valid)
        with torch.no_grad():
            self._values(query.detach(), key.detach(), mask, scaling, valid, causal=causal)
        self._sources.clear()
        self._tokens += int(valid.sum())

    def _scores(self, query: Tensor, key: Tensor, valid: Tensor) -> None:
        """What queries and keys do to the scores of their heads."""
        q_name, k_name, _ = self.layers.names
        groups = query.shape[1] // key.shape[1]
        counted = valid[:, None, :, None]
        grams = [(part * counted).detach().double() for part in (query, key)]
        of_queries, of_keys = (part.transpose(2, 3) @ part for part in grams)
        of_queries = of_queries.reshape(len(key), key.shape[1], groups, *of_queries.shape[2:]).sum(2)
        found_q = carried_gram(query, self._sources[q_name], of_keys.repeat_interleave(groups, 1), valid)
        found_k = carried_gram(key, self._sources[k_name], of_queries, valid)
        self._query = found_q if self._query is None else self._query + found_q
        self._key = found_k if self._key is None else self._key + found_k

    def _values(
        self, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float, valid: Tensor, *, causal: bool
    ) -> None:
        """Gram matrices of the value layer's inputs as every key head mixes them."""
        read, heads = self._read, key.shape[1]
        if read is None:
            return
        if not self._outputs:
            self._outputs = [GramMatrix(read.shape[-1], read.device) for _ in range(heads)]
        for sample, inputs in enumerate(read.float()):
            own = None if mask is None else mask[sample if len(mask) > 1 else 0]
            weights = attention_weights(query[sample].float(), key[sample].float(), scaling, own, causal=causal)
            weights *= valid[sample][None, :, None]
            for number, mixing in enumerate(weights.chunk(heads)):
                mixed = (mixing @ inputs).flatten(0, 1)
                for rows in mixed.split(CHUNK):
                    self._outputs[number].add(rows.contiguous(), rows.abs().amax(0))

    def finish(self) -> dict[str, HeadGrams]:
        """The matrices by the names of the layers; none where the attention was not seen or has another shape."""
        if not self._fits or self._query is None or self._key is None or not self._tokens:
            return {}
        q_name, k_name, v_name = self.layers.names
        outputs = [to_tensor(gram.mean(self._tokens)) for gram in self._outputs]
        return {
            q_name: HeadGrams(len(self._query), outputs=self._query / self._tokens),
            k_name: HeadGrams(len(self._key), outputs=self._key / self._tokens),
            v_name: HeadGrams(len(outputs), inputs=outputs),
        }


def _attentions(block: nn.Module) -> Iterator[tuple[nn.Module, _Layers]]:
    """Modules with a query, a key and a value layer, whose attention transformers computes with torch's kernel."""
    for module in block.modules():
        implementation = getattr(getattr(module, "config", None), "_attn_implementation", None)
        for names in LAYERS:
            linears = [getattr(module, name, None) for name in names]
            q, k, v = linears
            if implementation == WATCHABLE and all(isinstance(one, nn.Linear) for one in linears):
                yield module, _Layers(names, (q, k, v))  # type: ignore[arg-type] # all three are linear layers


@contextmanager
def _called(block: nn.Module, watched: dict[nn.Module, _Watched]) -> Iterator[None]:
    """Attentions report what they are given; undone afterwards."""

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **others: Any,  # noqa: ANN401 - transformers' own
    ) -> tuple[Tensor, Tensor | None]:
        one = watched.get(module)
        if one is not None:
            causal = others.get("is_causal")
            causal = getattr(module, "is_causal", True) if causal is None else causal
            scaling = others.get("scaling") or query.shape[-1] ** -0.5
            one.see(query, key, attention_mask, scaling, causal=bool(causal))
            if all(each.done for each in watched.values()):
                raise _AllSeen
        torch.set_grad_enabled(False)
        return sdpa_attention_forward(module, query, key, value, attention_mask, **others)

    handles = [handle for one in watched.values() for handle in _hooks(one)]
    configs: dict[int, Any] = {
        id(module.config): module.config for module in block.modules() if hasattr(module, "config")
    }
    before = {number: getattr(config, "_attn_implementation", None) for number, config in configs.items()}
    ALL_ATTENTION_FUNCTIONS[WATCHED] = attend
    try:
        for number, config in configs.items():
            if before[number] == WATCHABLE:
                config._attn_implementation = WATCHED
        yield
    finally:
        for number, config in configs.items():
            if before[number] == WATCHABLE:
                config._attn_implementation = WATCHABLE
        del ALL_ATTENTION_FUNCTIONS[WATCHED]
        for handle in handles:
            handle.remove()


def _hooks(one: _Watched) -> Iterator[Any]:
    """Linear layers compute without gradients; what follows a query or key layer has them."""

    def before(_module: nn.Module, _inputs: tuple[Tensor, ...]) -> None:
        torch.set_grad_enabled(False)

    def after(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            torch.set_grad_enabled(True)
            return one.kept(name, inputs[0], output)

        return hook

    for name, linear in zip(one.layers.names, one.layers.linears, strict=True):
        yield linear.register_forward_pre_hook(before)
        yield linear.register_forward_hook(after(name))
