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
    """Distance of one model's predictions from the original's, on answer tokens and on all text tokens."""

    answer: LogitsDistance = field(default_factory=LogitsDistance)
    text: LogitsDistance = field(default_factory=LogitsDistance)

    def add(self, encoded: Encoded, reference: np.ndarray, other: np.ndarray, names: Names = NAMES) -> None:
        """Add logits `[batch, sequence, vocabulary]` of the same batch; `names` are what messages call the two."""
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
            NumericalError: If an output is not finite; names the model and the first such layer or block.
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
    """Masks `[batch, sequence - 1]` of the positions whose next token is known: of the answer, or any text."""
    valid = encoded.attention_mask.astype(bool)
    pair = valid[:, :-1] & valid[:, 1:]
    return {"answer": pair & encoded.answer_mask[:, 1:], "text": pair & ~encoded.image_mask[:, 1:]}


def distance_of(measured: LogitsDistance) -> Distance:
    """A distance as data."""
    return Distance(kl=measured.mean_divergence(), top1=measured.agreement(), positions=measured.positions)


def _if_measured(errors: TokenErrors) -> TokenErrors | None:
    return errors if errors.tokens else None


def _shares(counts: Tensor) -> list[float] | None:
    total = int(counts.sum())
    return (counts.double() / total).tolist() if total else None
