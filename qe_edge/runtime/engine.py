"""A whole vision-language model from an ONNX or engine folder: pictures and questions in, logits or answers out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from qe_edge.models import FAMILIES, Encoded, ModelFamily, Sample
from qe_edge.models.configuration import load_config
from qe_edge.runtime.backends import check_runnable, open_sessions
from qe_edge.runtime.cache import KVCache, right_places, take_tokens
from qe_edge.runtime.embedding import TokenEmbedding
from qe_edge.runtime.engine_info import read_engine_info
from qe_edge.runtime.folder_model import FolderModel
from qe_edge.runtime.generation import adjust_logits, check_context, check_finite
from qe_edge.runtime.language import LanguageEngine
from qe_edge.runtime.limits import EngineLimits, check_limits, limits_of
from qe_edge.runtime.manifest import Manifest, read_manifest
from qe_edge.runtime.sessions import ACCURACY_LEVELS, Session
from qe_edge.system.errors import ArtifactError, InputError


@dataclass
class Decoding:
    """A batch whose prompt has been read and whose answers are being written.

    Attributes:
        positions: Positions of the prompt, as `family.position_ids` gives them.
        attention_mask: `[batch, tokens so far]` int64; padding stands left.
        tokens: `[batch, tokens so far]` int64.
        cache: Keys and values.
        step: Tokens fed after the prompt.
    """

    positions: np.ndarray
    attention_mask: np.ndarray
    tokens: np.ndarray
    cache: KVCache
    step: int = 0


class VisionLanguageEngine(LanguageEngine):
    """Runs an exported model; knows files only, neither torch nor how the model was quantized.

    `load` opens a folder. `generate` and `logits` do everything at once; `visual`, `merger`, `prefill` and `decode`
    are the steps that they consist of, so that each can be timed. Below these, `new_cache`, `embed` and `extend` feed
    any tokens to a cache that is kept.

    Attributes:
        manifest: The folder's manifest.
        family: The model's family.
        processor: Tokenizer and image processor.
        limits: The largest sizes that its engines take, None in ONNX Runtime.
        max_context: Most tokens of a prompt and its answer.

    Example:
        >>> engine = VisionLanguageEngine.load("out/demo/engines/cpu")  # doctest: +SKIP
        >>> engine.generate([Sample("picture.png", "what color is the shape?")], max_new_tokens=8)  # doctest: +SKIP
    """

    def __init__(
        self,
        manifest: Manifest,
        family: ModelFamily | FolderModel,
        processor: Any,  # noqa: ANN401 - each family has its own processor type
        embedding: TokenEmbedding,
        sessions: dict[str, Session],
        limits: EngineLimits | None = None,
        max_context: int | None = None,
    ) -> None:
        super().__init__(manifest, embedding, sessions, limits, max_context)
        self.family = family
        self.processor = processor

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        accuracy_level: int = 0,
        threads: int | None = None,
        plugin_library: Path | None = None,
        max_context: int | None = None,
        cuda_graph: bool = False,
    ) -> VisionLanguageEngine:
        """Open an ONNX folder (`qe-edge export`) or an engine folder (`qe-edge build`).

        Args:
            folder: The folder.
            accuracy_level: For ONNX Runtime: 0 is exact, 4 is faster and rounds activations of INT4 products.
            threads: For ONNX Runtime: number of threads, None for all cores.
            plugin_library: For engines with the plugin: its library, None for the one that is found.
            max_context: Most tokens of a prompt and its answer; None for the limit of the model or its engines.
            cuda_graph: For the target 'cuda': whether a token's launches are recorded and repeated as one CUDA graph.
                Not yet run on a GPU.

        Raises:
            InputError: If there is no such accuracy level or number of threads, the engines have none, or they do not
                take such a context or no CUDA graph.
            ArtifactError: If the folder is missing or damaged.
            TargetError: If this machine cannot run its engines.
        """
        folder = Path(folder)
        if accuracy_level not in ACCURACY_LEVELS:
            raise InputError(f"There is no accuracy level {accuracy_level}.", "Choose 0 (exact) or 4 (faster).")
        if threads is not None and threads < 1:
            raise InputError(f"{threads} threads cannot run anything.", "Choose at least 1.")
        info = read_engine_info(folder)
        if info is not None and info.backend != "onnxruntime":
            if accuracy_level:
                raise InputError("Only ONNX Runtime has accuracy levels.", "Choose accuracy level 0.")
            if threads is not None:
                raise InputError(
                    f"'{folder}' holds engines for a GPU, which use no threads of the CPU.", "Leave --threads out."
                )
        if cuda_graph and (info is None or info.backend != "onnxruntime_cuda"):
            raise InputError("Only engines of the target 'cuda' record CUDA graphs.", "Leave cuda_graph out.")
        check_runnable(folder, plugin_library)
        manifest = read_manifest(folder)
        if info is not None:
            info.check_belongs(manifest, folder)
        limits = limits_of(manifest) if info is not None and info.sized else None
        _check_max_context(max_context, manifest, limits)
        embedding = TokenEmbedding(folder, manifest.vocab_size, manifest.hidden_size, manifest.embeds_width)
        family, processor = _family_and_processor(folder, manifest)
        sessions = open_sessions(
            folder, manifest.graphs, info, threads, plugin_library, accuracy_level, cuda_graph=cuda_graph
        )
        return cls(manifest, family, processor, embedding, sessions, limits, max_context)

    def encode(self, samples: Sequence[Sample], *, answers: bool = False) -> Encoded:
        """Tokenize prompts and prepare pictures as one left-padded batch; with `answers`, for teacher forcing.

        Raises:
            InputError: If a picture cannot be read or there is no sample.
        """
        if not samples:
            raise InputError("There is nothing to answer.", "Pass at least one question.")
        return self.family.encode(self.processor, samples, answers=answers)

    def generate(self, samples: Sequence[Sample], max_new_tokens: int = 64) -> list[str]:
        """Greedy answers as text."""
        tokens = self.generate_ids(self.encode(samples), max_new_tokens)
        return [self.processor.tokenizer.decode(row, skip_special_tokens=True).strip() for row in tokens]

    def generate_ids(self, encoded: Encoded, max_new_tokens: int = 64) -> list[list[int]]:
        """Greedy answers as token ids, each without the token that ended it.

        Raises:
            InputError: If prompt and answer are longer than the model's context.
            NumericalError: If logits are not finite.
        """
        self.check_length(encoded, max_new_tokens)
        ends = self.manifest.eos_token_ids
        answers: list[list[int]] = [[] for _ in encoded.input_ids]
        running = np.ones(len(answers), bool)
        logits, state = self.prefill(encoded, self.features(encoded), max_new_tokens)
        for index in range(max_new_tokens):
            tokens = self.next_tokens(logits, state)
            running &= ~np.isin(tokens, ends)
            for row in np.flatnonzero(running):
                answers[row].append(int(tokens[row]))
            if not running.any() or index == max_new_tokens - 1:
                break
            logits = self.decode(state, np.where(running, tokens, self.manifest.pad_token_id))
        return answers

    def logits(self, encoded: Encoded) -> np.ndarray:
        """Logits float32 `[batch, sequence, vocabulary]` of every position of a batch, teacher-forced.

        Padding has the logits of its row's first token.

        Raises:
            InputError: If the batch is longer than the model's context.
            NumericalError: If logits are not finite.
        """
        self.check_length(encoded, 0)
        lengths = encoded.attention_mask.sum(1, keepdims=True)
        sequence = encoded.input_ids.shape[1]
        asked = np.maximum(np.arange(sequence) - (sequence - lengths), 0)  # padding gets those of the first token
        cache = self.new_cache(len(lengths), self.room(sequence, 0))
        logits = self._read(encoded, self.features(encoded), cache, asked)
        check_finite(logits, "The logits of the engine")
        return logits

    def next_tokens(self, logits: np.ndarray, state: Decoding) -> np.ndarray:
        """The tokens `[batch]` int64 that follow: the most likely ones after the manifest's generation settings.

        Args:
            logits: As `prefill` and `decode` return them.
            state: The batch that they belong to.

        Raises:
            NumericalError: If logits are not finite.
        """
        last = logits[:, -1]
        check_finite(last, "The logits of the engine")
        scores = adjust_logits(self.manifest.generation, last, state.tokens, state.attention_mask, state.step)
        chosen: np.ndarray = scores.argmax(-1)
        return chosen

    def check_length(self, encoded: Encoded, max_new_tokens: int) -> None:
        """Refuse a prompt that leaves too little of the context, before anything runs.

        Raises:
            InputError: If prompt and answer are longer than the model's context, or larger than the engine takes.
        """
        check_context(int(encoded.attention_mask.sum(1).max()), max_new_tokens, self.max_context)
        if self.limits is not None:
            check_limits(self.limits, encoded, max_new_tokens)

    def features(self, encoded: Encoded) -> np.ndarray | None:
        """Image features `[features, hidden]` of a batch, None without pictures."""
        if not encoded.pixels:
            return None
        runs = self._seen(encoded)
        alike = len({hidden.shape[1:] for hidden in runs}) == 1
        return np.concatenate([self.merger(hidden) for hidden in ([np.concatenate(runs)] if alike else runs)])

    def visual(self, encoded: Encoded) -> np.ndarray:
        """Output of the visual encoder for all pictures of a prompt, or of a batch whose tokens are made alike."""
        return np.concatenate(self._seen(encoded))

    def _seen(self, encoded: Encoded) -> list[np.ndarray]:
        """Outputs of the visual encoder's runs."""
        runs = [self._sessions["visual"].run(feeds).values() for feeds in self.family.visual_feeds(encoded)]
        return [np.asarray(hidden) for (hidden,) in runs]

    def merger(self, hidden: np.ndarray) -> np.ndarray:
        """Image features `[features, hidden]` of the visual encoder's output."""
        name = self.manifest.graphs["merger"].inputs[0].name
        (features,) = self._sessions["merger"].run({name: hidden}).values()
        return np.asarray(features)

    def prefill(
        self, encoded: Encoded, features: np.ndarray | None, max_new_tokens: int | None = None
    ) -> tuple[np.ndarray, Decoding]:
        """Read prompts.

        Args:
            encoded: The batch.
            features: Its image features `[features, width]`, in the order of the image tokens; None without pictures.
            max_new_tokens: Tokens of the answers that the cache has room for; None for as many as fit by default.

        Returns:
            Logits float32 `[batch, 1, vocabulary]` of the last tokens, and the state for `decode`.

        Raises:
            InputError: If features and image tokens do not match, or the prompts do not fit.
            ArtifactError: If a graph computes another shape than the manifest says.
        """
        rows, sequence = encoded.input_ids.shape
        cache = self.new_cache(rows, self.room(sequence, max_new_tokens))
        last = encoded.attention_mask.sum(1, keepdims=True) - 1
        logits = self._read(encoded, features, cache, last)
        return logits, Decoding(self.family.position_ids(encoded), encoded.attention_mask, encoded.input_ids, cache)

    def decode(self, state: Decoding, tokens: np.ndarray) -> np.ndarray:
        """Feed the next tokens of every row.

        Args:
            state: From `prefill`; goes on with the tokens.
            tokens: Integers `[batch]`, or `[batch, n]` for n tokens one after the other.

        Returns:
            Logits float32 `[batch, n, vocabulary]`, n being 1 for `[batch]`.

        Raises:
            InputError: If there is no token for some row, a token is none, or the context is full.
        """
        tokens = np.asarray(tokens)
        rows = len(state.attention_mask)
        if tokens.ndim not in (1, 2) or tokens.shape[0] != rows or not tokens.size:
            raise InputError(
                f"Tokens of shape {list(tokens.shape)} cannot be fed to a batch of {rows}.",
                f"Give integers of shape [{rows}] or [{rows}, n].",
            )
        if tokens.dtype.kind not in "iu":
            raise InputError(f"Tokens of type {tokens.dtype} are no token ids.", "Give integers.")
        if tokens.min() < 0 or tokens.max() >= self.manifest.vocab_size:
            raise InputError(
                f"A token is outside the vocabulary of {self.manifest.vocab_size}.", "Give ids of the tokenizer."
            )
        columns = tokens.astype(np.int64).reshape(rows, -1)
        check_context(int(state.cache.lengths.max()), columns.shape[1], state.cache.capacity)
        # one by one, as engines are built for
        return np.concatenate([self._step(state, column[:, None]) for column in columns.T], axis=1)

    def _step(self, state: Decoding, tokens: np.ndarray) -> np.ndarray:
        """Logits `[batch, 1, vocabulary]` after one token per row, `[batch, 1]`."""
        ones = np.ones(tokens.shape, state.attention_mask.dtype)
        positions = self.family.next_position_ids(state.positions, state.step)
        logits = self.feed(state.cache, self.embed(tokens), positions, ones[:, 0], np.zeros_like(tokens))
        state.attention_mask = np.concatenate((state.attention_mask, ones), axis=1)
        state.tokens = np.concatenate((state.tokens, tokens), axis=1)
        state.step += 1
        return logits

    def _read(self, encoded: Encoded, features: np.ndarray | None, cache: KVCache, asked: np.ndarray) -> np.ndarray:
        """Feed a batch of prompts; logits `[batch, asked, vocabulary]` of the tokens `asked` of each row."""
        places = right_places(encoded.attention_mask)
        embeds = self.embed(encoded.input_ids, features, encoded.image_mask)
        positions = self.family.position_ids(encoded)
        return self.feed(
            cache,
            np.ascontiguousarray(take_tokens(embeds, places, 0)),
            take_tokens(positions, places, positions.ndim - 2),
            encoded.attention_mask.sum(1),
            asked,
            take_tokens(self.family.graph_mask(encoded), places, 0),
        )


def _check_max_context(wanted: int | None, manifest: Manifest, limits: EngineLimits | None) -> None:
    most = manifest.max_context if limits is None or limits.context is None else limits.context
    if wanted is not None and not 2 <= wanted <= most:
        what = "The model attends" if limits is None else "The engine was built to attend"
        raise InputError(f"{what} to 2 to {most} tokens, {wanted} are asked for.", "Change --max-context.")


def _family_and_processor(folder: Path, manifest: Manifest) -> tuple[ModelFamily | FolderModel, Any]:
    """The model's family with transformers' processors; without transformers a model of the folder's own files."""
    if find_spec("transformers") is None:
        model = FolderModel(folder, manifest)
        return model, model.processor
    family = family_of_engines(folder, manifest.model_type)
    return family, family.load_processor(str(folder))


def family_of_engines(folder: Path, model_type: str) -> ModelFamily:
    """The model family of a folder, from its configuration; imports no torch.

    Raises:
        ArtifactError: If the configuration is missing, damaged or of another model.

    Example:
        >>> from qe_edge.demo import model_path
        >>> family_of_engines(model_path(), "qwen2_vl").model_type
        'qwen2_vl'
    """
    config = load_config(str(folder), ArtifactError)
    if config.model_type != model_type or model_type not in FAMILIES:
        raise ArtifactError(
            f"'{folder}' holds a '{config.model_type}' configuration and a '{model_type}' manifest.",
            f"Export the model again; supported families are {', '.join(FAMILIES)}.",
        )
    return FAMILIES[model_type](config)
