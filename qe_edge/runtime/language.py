"""The language graph of an exported model over a KV cache that is kept: tokens in, logits out."""

from __future__ import annotations

from typing import Literal

import numpy as np

from qe_edge.runtime.cache import KVCache, new_cache, take_tokens
from qe_edge.runtime.cache_tensors import sizes_of
from qe_edge.runtime.embedding import TokenEmbedding
from qe_edge.runtime.generation import check_context
from qe_edge.runtime.limits import EngineLimits
from qe_edge.runtime.manifest import Manifest
from qe_edge.runtime.sessions import Array, Session
from qe_edge.system.errors import ArtifactError, InputError, ResourceError

CAPACITY = 8192  # tokens of a cache in ONNX Runtime, unless the user asks for others
STEP = 256  # tokens by which caches are made larger than they must be, so that they are of few sizes


class LanguageEngine:
    """Embeds tokens and feeds them to caches.

    Args:
        manifest: The folder's manifest.
        embedding: Its table of token embeddings.
        sessions: Its graphs.
        limits: The largest sizes that its engines take, None in ONNX Runtime.
        max_context: Most tokens of a prompt and its answer; None for the limit of the model or its engines.

    Example:
        >>> from qe_edge.runtime.engine import VisionLanguageEngine  # doctest: +SKIP
        >>> engine = VisionLanguageEngine.load("out/demo/engines/cpu")  # it is a LanguageEngine too  # doctest: +SKIP
        >>> cache, positions = engine.new_cache(batch=1, capacity=512), np.zeros((3, 1, 2), np.int64)  # doctest: +SKIP
        >>> logits = engine.extend(cache, engine.embed(np.array([[5, 6]])), positions, np.array([2]))  # doctest: +SKIP
    """

    def __init__(
        self,
        manifest: Manifest,
        embedding: TokenEmbedding,
        sessions: dict[str, Session],
        limits: EngineLimits | None = None,
        max_context: int | None = None,
    ) -> None:
        self.manifest = manifest
        self.limits = limits
        built = manifest.max_context if limits is None or limits.context is None else limits.context
        self.max_context = min(built, max_context or built)
        self._largest = built  # capacity of a cache
        self._capacity = built if limits else min(self.max_context, built if max_context else CAPACITY)  # by default
        self._embedding = embedding
        self._sessions = sessions

    def embed(
        self, token_ids: np.ndarray, features: np.ndarray | None = None, image_mask: np.ndarray | None = None
    ) -> np.ndarray:
        """Input of the language graph: float32 `[batch, tokens, width]`.

        Args:
            token_ids: int64 `[batch, tokens]`.
            features: Image features `[features, width]`, in the order of the image tokens; None without pictures.
            image_mask: `[batch, tokens]` bool, True where a feature stands; None without pictures.

        Raises:
            InputError: If features and image tokens do not match.
            ArtifactError: If the merger computes another width than the manifest says.
        """
        embeds = self._embedding(token_ids)
        further = self.manifest.embeds_width - embeds.shape[-1]
        if further:  # what pictures alone have after the first `hidden_size` is 0
            embeds = np.pad(embeds, ((0, 0), (0, 0), (0, further)))
        count, wanted = 0 if features is None else len(features), 0 if image_mask is None else int(image_mask.sum())
        if count != wanted:
            raise InputError(
                f"There are {count} image features for {wanted} image tokens.", "Pass the features of the same batch."
            )
        if features is not None and image_mask is not None:
            check_shape(features, (count, embeds.shape[-1]), "merger")
            embeds[image_mask] = features
        return embeds

    def new_cache(self, batch: int = 1, capacity: int | None = None) -> KVCache:
        """An empty KV cache.

        Args:
            batch: Rows.
            capacity: Tokens that fit into a row; None for 8192 in ONNX Runtime, or the limit of the engines. Engines
                that write in place have one capacity, and ignore this.

        Raises:
            InputError: If the model or its engines do not take as many rows or tokens.
            ResourceError: If memory does not suffice.

        Example:
            `cache = engine.new_cache(capacity=1024)`, then
            `engine.extend(cache, engine.embed(ids), positions, np.array([ids.shape[1]]))`.
        """
        fixed = self.limits is not None and self.manifest.kv.in_place  # engines that write in place have one capacity
        capacity = self._capacity if capacity is None or fixed else capacity
        rows = None if self.limits is None else self.limits.batch
        if batch < 1 or (rows is not None and batch > rows):
            raise InputError(f"A cache of {batch} rows cannot be had.", f"Choose 1 to {rows or 'any number of'} rows.")
        if not 1 <= capacity <= self._largest:
            raise InputError(
                f"A cache of {capacity} tokens cannot be had: at most {self._largest} fit.",
                "Choose fewer, or build or load with a larger --max-context.",
            )
        kv, specs, session = self.manifest.kv, self.manifest.cache, self._sessions["language"]
        tensors = {spec.name: (sizes_of(spec, batch, capacity), np.dtype(spec.dtype)) for spec in specs}
        try:
            return new_cache(batch, capacity, session.zeros, tensors, in_place=kv.in_place)
        except (MemoryError, OSError) as error:  # the latter where pages are asked for
            size = sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in tensors.values())
            raise ResourceError(
                f"A cache of {batch} x {capacity} tokens needs {size >> 20} MiB of memory.", "Choose a smaller context."
            ) from error

    def extend(
        self,
        cache: KVCache,
        embeds: np.ndarray,
        positions: np.ndarray,
        lengths: np.ndarray,
        logits: Literal["last", "all"] = "last",
        numbers: np.ndarray | None = None,
    ) -> np.ndarray:
        """Feed tokens to a cache.

        Args:
            cache: From `new_cache`; holds the tokens afterwards.
            embeds: float32 `[batch, tokens, width]`, as `embed` makes them; every row's tokens first, then padding.
            positions: int64 `[batch, tokens]`, with leading axes where the family has them.
            lengths: Tokens of every row, int64 `[batch]`, at least 1.
            logits: "last" gives the logits of every row's last token, "all" the logits of all tokens.
            numbers: The family's `graph_mask` on the tokens, `[batch, tokens]`; None for text alone.

        Returns:
            float32 `[batch, vocabulary]` or `[batch, tokens, vocabulary]`. Logits beyond a row's tokens mean nothing.

        Raises:
            InputError: If shapes do not fit together, or the tokens do not fit into the cache.
        """
        rows, tokens = embeds.shape[:2]
        if rows != cache.batch or positions.shape[-2:] != (rows, tokens) or np.shape(lengths) != (rows,):
            raise InputError(
                f"Embeddings {list(embeds.shape)}, positions {list(positions.shape)} and lengths "
                f"{list(np.shape(lengths))} do not fit a cache of {cache.batch} rows.",
                "Give [rows, tokens, width], [rows, tokens] and [rows].",
            )
        if lengths.min() < 1 or lengths.max() > tokens:
            raise InputError(f"A row has {lengths.min()} to {lengths.max()} of {tokens} tokens.", "Give 1 to all.")
        check_context(int((cache.lengths + lengths).max()), 0, cache.capacity)
        asked = lengths[:, None] - 1 if logits == "last" else np.tile(np.arange(tokens), (rows, 1))
        found = self.feed(cache, embeds, positions, lengths, asked, numbers)
        return found[:, 0] if logits == "last" else found

    def room(self, prompt: int, new: int | None) -> int:
        """Capacity of a cache for a prompt of so many tokens and its answer; None for an answer of any length."""
        if new is None:
            return self._capacity if prompt <= self._capacity else self.max_context
        return min(-(-(prompt + new) // STEP) * STEP, self.max_context)

    def feed(
        self,
        cache: KVCache,
        embeds: np.ndarray,
        positions: np.ndarray,
        lengths: np.ndarray,
        asked: np.ndarray,
        numbers: np.ndarray | None = None,
    ) -> np.ndarray:
        """As `extend`, with logits of the tokens `asked` `[batch, n]`; one call of the graph where it can be."""
        most = int(lengths.max())
        total = int((cache.lengths + lengths).max())
        built = None if self.limits is None else self.limits.prompt
        if most == 1 or not cache.lengths.any() or (cache.batch == 1 and (built is None or total <= built)):
            return self._call(cache, embeds[:, :most], positions[..., :most], lengths, asked, numbers)
        if numbers is not None and numbers.max() > 1:
            raise InputError(
                "A picture cannot follow earlier tokens here: its tokens have to be read at once.",
                "Ask one question at a time, or build with a larger --max-prompt.",
            )
        found = np.zeros((*asked.shape, self.manifest.vocab_size), np.float32)
        zero = np.zeros((cache.batch, 1), np.int64)
        for step in range(most):
            # rows end together: what a shorter row is fed before its first token is written over by that
            index = np.maximum(step - (most - lengths), 0)[:, None]
            real = step >= most - lengths
            step_embeds, step_positions = (
                take_tokens(embeds, index, 0),
                take_tokens(positions, index, positions.ndim - 2),
            )
            logits = self._call(cache, step_embeds, step_positions, np.ones_like(lengths), zero, kept=real)
            for row, place in zip(*np.nonzero((asked == index) & real[:, None]), strict=True):
                found[row, place] = logits[row, 0]
        return found

    def _call(
        self,
        cache: KVCache,
        embeds: np.ndarray,
        positions: np.ndarray,
        lengths: np.ndarray,
        asked: np.ndarray,
        numbers: np.ndarray | None = None,
        kept: np.ndarray | None = None,
    ) -> np.ndarray:
        """One call of the graph, or one for every part of the logits; rows that are not `kept` stay as they were."""
        steady = self._sessions["language"].steady and embeds.shape[1] == 1
        mask = cache.with_new(lengths, numbers)
        after = cache.lengths + lengths
        feeds: dict[str, Array] = {
            "inputs_embeds": np.ascontiguousarray(embeds),
            "position_ids": np.ascontiguousarray(positions),
            "attention_mask": mask if steady else np.ascontiguousarray(mask[:, : after.max()]),
        }
        parts = []
        for start in range(0, asked.shape[1], self._logits_at_once):
            part = np.ascontiguousarray(asked[:, start : start + self._logits_at_once])
            outputs = self._sessions["language"].run({**feeds, **cache.past, "logit_positions": part}, cache.present)
            logits = np.asarray(outputs.pop("logits"))
            check_shape(logits, (*part.shape, self.manifest.vocab_size), "language")
            parts.append(logits)
        cache.written(outputs, kept)  # once: every part begins with the same states
        cache.lengths = after if kept is None else np.where(kept, after, cache.lengths)
        cache.mask = mask if kept is None else np.where(kept[:, None], mask, cache.mask)
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)

    @property
    def _logits_at_once(self) -> int:
        """Positions of a row whose logits one call computes."""
        if self.limits is None:
            return self.manifest.max_context
        return self.manifest.graphs["language"].profiles["prefill"]["logit_positions"][2][1]


def check_shape(values: np.ndarray, shape: tuple[int, ...], graph: str) -> None:
    """Refuse an output of another shape than the manifest says.

    Raises:
        ArtifactError: If it is one.

    Example:
        >>> check_shape(np.zeros((1, 8)), (1, 9), "language")
        Traceback (most recent call last):
            ...
        qe_edge.system.errors.ArtifactError: The graph 'language' computes the shape [1, 8], the manifest says [1,
        9]. Export and build the model again.
    """
    if values.shape != shape:
        raise ArtifactError(
            f"The graph '{graph}' computes the shape {list(values.shape)}, the manifest says {list(shape)}.",
            "Export and build the model again.",
        )
