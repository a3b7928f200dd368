"""Teacher-forced comparison: original, quantized and engine see the same tokens, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from qe_edge.budget.accounting import group_of
from qe_edge.layers.linear import quantized_linears
from qe_edge.models.family import Encoded, Sample
from qe_edge.models.loading import LoadedModel
from qe_edge.validate.answers import BATCH, batches
from qe_edge.validate.metrics import NAMES, LogitsDistance, Names, RelativeError
from qe_edge.validate.probes import LayerProbe, StreamProbe
from qe_edge.validate.schema import Distance, LayerErrors, Role, RoutingLoad, StreamErrors, TokenErrors
from qe_edge.validate.subjects import Subject, TorchSubject, block_groups

ENGINE: Names = ("the model in PyTorch", "the engine")
LOGITS_BYTES = 1 << 30  # most memory that one batch of logits may take


@dataclass
class TeacherForced:
    """Distance of one model's predictions from the original's, on answer tokens and on all text tokens.

    Example:
        >>> ids, mask = np.array([[5, 6, 7, 8]]), np.ones((1, 4), np.int64)
        >>> encoded = Encoded(ids, mask, np.zeros((1, 4), bool), np.array([[False, False, True, True]]))
        >>> logits = np.random.default_rng(0).normal(size=(1, 4, 10)).astype(np.float32)
        >>> distances = TeacherForced()
        >>> distances.add(encoded, logits, 2 * logits)
        >>> distances.answer.positions, distances.text.positions, distances.text.agreement()
        (2, 3, 1.0)
    """

    answer: LogitsDistance = field(default_factory=LogitsDistance)
    text: LogitsDistance = field(default_factory=LogitsDistance)

    def add(self, encoded: Encoded, reference: np.ndarray, other: np.ndarray, names: Names = NAMES) -> None:
        """Add logits `[batch, sequence, vocabulary]` of the same batch; messages call the two models by `names`."""
        for name, mask in predicting_positions(encoded).items():
            distance: LogitsDistance = getattr(self, name)
            distance.add(torch.from_numpy(reference[:, :-1][mask]), torch.from_numpy(other[:, :-1][mask]), names)


class Comparison:
    """Runs the models side by side and keeps only sums.

    Args:
        original: The original model in float32.
        quantized: The quantized model in float32.
        engine: The built engine, or None.
        most: Most samples of a batch.

    Example:
        >>> from qe_edge.calibration.sources import load_evaluation
        >>> from qe_edge.validate.subjects import load_float32
        >>> original, other = load_float32("demo"), load_float32("demo")
        >>> _ = other.model.lm_head.weight.data.mul_(0.9)  # stands for a quantized model
        >>> comparison = Comparison(original, other, engine=None)
        >>> comparison.measure_heldout(load_evaluation("demo")[:4], done=lambda count: None)
        >>> distance = comparison.distances["quantized"].answer
        >>> distance.positions, distance.agreement(), f"mean KL {distance.mean_divergence():.1e}"
        (8, 1.0, 'mean KL 1.1e-03')
    """

    def __init__(
        self, original: LoadedModel, quantized: LoadedModel, engine: Subject | None, most: int = BATCH
    ) -> None:
        self._most = most
        self._original = original
        self._engine = engine
        settings = TorchSubject(quantized).settings
        self._subjects = TorchSubject(original, settings), TorchSubject(quantized, settings)
        self._layers = quantized_linears(quantized.model)
        blocks = original.family.blocks(original.model)
        groups = block_groups(original)
        self._groups = {name: group_of(name, groups) for name in self._layers}
        self._probes = {split: self._probe() for split in ("calibration", "heldout")}
        self._stream = StreamProbe(blocks, quantized.family.blocks(quantized.model))
        self.distances: dict[Role, TeacherForced] = {"quantized": TeacherForced()}
        if engine is not None:
            self.distances["engine"] = TeacherForced()
        self.engine_error = RelativeError()

    def measure_heldout(self, samples: Sequence[Sample], done: Callable[[int], None]) -> None:
        """Layers, streams and logits on held-out samples with their answers.

        Raises:
            NumericalError: If an output is not finite. The message names the model and the first such layer or block.
        """
        original, quantized = self._subjects
        for part in batches(samples, self.batch_size(samples)):
            encoded = self._encode(part)
            with self._probes["heldout"].watching(encoded), self._stream.recording():
                wanted = original.logits(encoded)
            with self._stream.comparing(encoded):
                found = quantized.logits(encoded)
            self.distances["quantized"].add(encoded, wanted, found)
            if self._engine is not None:
                built = self._engine.logits(encoded)
                valid = encoded.attention_mask.astype(bool)
                self.distances["engine"].add(encoded, wanted, built, ENGINE)
                self.engine_error.add(torch.from_numpy(found[valid]), torch.from_numpy(built[valid]), ENGINE)
            done(len(part))

    def measure_calibration(self, samples: Sequence[Sample], done: Callable[[int], None]) -> None:
        """Layers on the calibration samples."""
        for part in batches(samples, self.batch_size(samples)):
            encoded = self._encode(part)
            with self._probes["calibration"].watching(encoded):
                self._subjects[0].logits(encoded)
            done(len(part))

    def batch_size(self, samples: Sequence[Sample]) -> int:
        """Samples per batch, fewer where long prompts meet a large vocabulary."""
        tokens = self._encode(samples[:1]).input_ids.shape[1]
        row = 4 * tokens * self._original.family.config.get_text_config().vocab_size
        return int(max(1, min(self._most, LOGITS_BYTES // row)))

    def layer_errors(self) -> list[LayerErrors]:
        """Errors of every quantized layer, in module order."""
        return [
            LayerErrors(
                name=name,
                group=self._groups[name],
                calibration=_if_measured(self._probes["calibration"].errors[name].result()),
                heldout=self._probes["heldout"].errors[name].result(),
            )
            for name in self._layers
        ]

    def stream_errors(self) -> list[StreamErrors]:
        """Error of the hidden states behind every block, in the order of the blocks."""
        return [
            StreamErrors(name=block.name, group=block.group, heldout=self._stream.errors[block.name].result())
            for block in self._original.family.blocks(self._original.model)
        ]

    def routing_loads(self) -> list[RoutingLoad]:
        """Load of every router; siblings that share one are named together."""
        sharing: dict[int, list[str]] = {}
        for name, layer in self._layers.items():
            if layer.router is not None:
                sharing.setdefault(id(layer.router), []).append(name)
        return [self._load(names) for names in sharing.values()]

    def _load(self, names: list[str]) -> RoutingLoad:
        counts = self._probes["heldout"].load[names[0]]
        return RoutingLoad(
            layers=names,
            group=self._groups[names[0]],
            all=_shares(counts["vision"] + counts["text"]) or [],
            vision=_shares(counts["vision"]),
            text=_shares(counts["text"]),
        )

    def _probe(self) -> LayerProbe:
        return LayerProbe(self._original.model, self._layers, self._groups)

    def _encode(self, samples: Sequence[Sample]) -> Encoded:
        return self._original.family.encode(self._original.processor, samples, answers=True)


def predicting_positions(encoded: Encoded) -> dict[str, np.ndarray]:
    """Masks `[batch, sequence - 1]` of the positions before a token of the answer, and before any text token.

    Example:
        >>> ids, mask = np.array([[5, 6, 7, 8]]), np.ones((1, 4), np.int64)
        >>> picture, answer = np.array([[True, False, False, False]]), np.array([[False, False, False, True]])
        >>> masks = predicting_positions(Encoded(ids, mask, picture, answer))
        >>> masks["text"].tolist(), masks["answer"].tolist()
        ([[True, True, True]], [[False, False, True]])
    """
    valid = encoded.attention_mask.astype(bool)
    pair = valid[:, :-1] & valid[:, 1:]
    return {"answer": pair & encoded.answer_mask[:, 1:], "text": pair & ~encoded.image_mask[:, 1:]}


def distance_of(measured: LogitsDistance) -> Distance:
    """Return a distance as a part of the report.

    Example:
        >>> measured = LogitsDistance(divergence=0.5, agreed=9, positions=10)
        >>> distance_of(measured)
        Distance(kl=0.05, top1=0.9, positions=10)
    """
    return Distance(kl=measured.mean_divergence(), top1=measured.agreement(), positions=measured.positions)


def _if_measured(errors: TokenErrors) -> TokenErrors | None:
    return errors if errors.tokens else None


def _shares(counts: Tensor) -> list[float] | None:
    total = int(counts.sum())
    return (counts.double() / total).tolist() if total else None
