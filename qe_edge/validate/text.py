"""Measures of a language model on known tokens: how well it predicts them, and its distance from the original.

Hidden states before the head are kept instead of logits: for a vocabulary of 49,152 tokens they are 85 times smaller.
The measures are `perplexity` and `mean_kl` on running text, and `mean_kl` and `exact_answers` on reference answers.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from qe_edge.models.family import Encoded
from qe_edge.models.loading import LoadedModel
from qe_edge.system.errors import CalibrationError, ModelError, NumericalError
from qe_edge.validate.comparison import predicting_positions
from qe_edge.validate.metrics import REMEDY

WINDOW = 256  # tokens
ROWS = 256  # predictions whose logits are held at a time


@dataclass(frozen=True)
class Predictions:
    """Predictions of a model at chosen positions.

    Attributes:
        hidden: Hidden states before the head, float32 `[positions, hidden]`.
        head: The head, float32.
        targets: The tokens that follow, int64 `[positions]`.
        samples: Number of the sample that a position belongs to, int64 `[positions]`.

    Example:
        >>> head = nn.Linear(8, 100)
        >>> predictions = Predictions(torch.randn(5, 8), head, torch.arange(5), torch.zeros(5, dtype=torch.int64))
        >>> [(tuple(logits.shape), targets.tolist()) for logits, targets in predictions.logits()]
        [((5, 100), [0, 1, 2, 3, 4])]
    """

    hidden: Tensor
    head: nn.Module
    targets: Tensor
    samples: Tensor

    def logits(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Logits `[rows, vocabulary]` and targets `[rows]`, a few positions at a time."""
        for start in range(0, len(self.hidden), ROWS):
            with torch.no_grad():  # not around the yield: it would also hold in the loop that reads the rows
                rows = self.head(self.hidden[start : start + ROWS])
            yield rows, self.targets[start : start + ROWS]


def text_windows(
    tokenizer: Any,  # noqa: ANN401 - tokenizers share no typed base
    texts: Sequence[str],
    *,
    length: int = WINDOW,
    limit: int | None = None,
    batch: int = 4,
) -> list[Encoded]:
    """Join texts and cut them into windows; the model reads every window without the text before it.

    Args:
        tokenizer: A tokenizer of transformers.
        texts: Running text.
        length: Tokens of a window; the last one may be shorter and is padded on the right, outside the mask.
        limit: The largest number of windows.
        batch: Windows of a batch.

    Raises:
        CalibrationError: If there are not even two tokens.

    Example:
        >>> from qe_edge.models.loading import load_model
        >>> tokenizer = load_model("demo").processor.tokenizer
        >>> windows = text_windows(tokenizer, ["what color is the shape?"] * 20, length=32, batch=2)
        >>> [batch.input_ids.shape for batch in windows]
        [(2, 32), (2, 32), (1, 32)]
    """
    tokens: list[int] = []
    for text in texts:
        tokens.extend(tokenizer(f"{text}\n\n", add_special_tokens=False, verbose=False)["input_ids"])
        if limit is not None and len(tokens) >= limit * length:
            break
    windows = [tokens[start : start + length] for start in range(0, len(tokens), length)][:limit]
    windows = [window for window in windows if len(window) > 1]
    if not windows:
        raise CalibrationError("There is no text to measure on.", "Give lines with at least two tokens.")
    return [_window_batch(windows[start : start + batch], length) for start in range(0, len(windows), batch)]


def predict(loaded: LoadedModel, batches: Sequence[Encoded], where: Literal["text", "answer"]) -> Predictions:
    """Run a model over batches, teacher-forced and in the precision of its weights, and keep its predictions.

    Args:
        loaded: A model that writes text.
        batches: The batches that it reads.
        where: "text": every text token that follows another token; "answer": tokens of the reference answers, with
            the one that ends them. Padding is never counted.

    Raises:
        ModelError: If the model writes no text.
        CalibrationError: If there is nothing to predict.

    Example:
        >>> from qe_edge.calibration.sources import load_evaluation
        >>> from qe_edge.models.loading import load_model
        >>> loaded, samples = load_model("demo"), load_evaluation("demo")[:2]
        >>> encoded = loaded.family.encode(loaded.processor, samples, answers=True)
        >>> predictions = predict(loaded, [encoded], "answer")
        >>> loaded.processor.tokenizer.decode(predictions.targets)
        'yes<|im_end|>rectangle<|im_end|>'
        >>> predictions.samples.tolist()
        [0, 0, 1, 1]
    """
    if not loaded.family.writes_text:
        raise ModelError(f"A '{loaded.family.model_type}' model predicts no tokens.", "Compare its features instead.")
    hidden, targets, samples, first = [], [], [], 0
    for encoded in batches:
        mask = predicting_positions(encoded)[where]
        states = _last_hidden(loaded, encoded)[:, :-1]
        hidden.append(states[torch.from_numpy(mask)].float())
        targets.append(encoded.input_ids[:, 1:][mask])
        samples.append(first + np.nonzero(mask)[0])
        first += len(mask)
    if not any(map(len, targets)):
        raise CalibrationError(f"There is no {where} to predict.", "Give samples with answers, or longer texts.")
    head: Any = loaded.model.get_output_embeddings()
    return Predictions(
        torch.cat(hidden),
        copy.deepcopy(head).float(),
        torch.from_numpy(np.concatenate(targets)),
        torch.from_numpy(np.concatenate(samples)),
    )


def perplexity(predictions: Predictions) -> float:
    """Perplexity: e to the mean negative log-likelihood of the true tokens in nats. 1 is certain and right.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> head = nn.Linear(8, 100)
        >>> unsure = Predictions(torch.zeros(50, 8), head, torch.arange(50), torch.zeros(50, dtype=torch.int64))
        >>> round(perplexity(unsure))  # a model that knows nothing: about the size of the vocabulary
        101
    """
    total = sum(
        float(nn.functional.cross_entropy(logits, targets, reduction="sum")) for logits, targets in predictions.logits()
    )
    _check_measure(total)
    return float(np.exp(total / len(predictions.targets)))


def mean_kl(original: Predictions, other: Predictions) -> float:
    """Mean KL(original || other) of the predicted distributions, in nats per token.

    Computed in float32 as the sum of p (exp(d) - 1 - d) with d = log q - log p: since p and q both sum to 1 that is the
    divergence, and no term is below 0, so small divergences do not drown in rounding.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> head, hidden, tokens = nn.Linear(8, 100), torch.randn(50, 8), torch.arange(50)
        >>> original, other = (Predictions(states, head, tokens, tokens // 10) for states in (hidden, 1.1 * hidden))
        >>> mean_kl(original, original), round(mean_kl(original, other), 4)
        (0.0, 0.0014)
    """
    return float(_divergences(original, other).mean())


def median_kl(original: Predictions, other: Predictions) -> float:
    """Median over samples of the mean KL of their tokens: the loss of a typical answer, unmoved by the worst ones.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> head, tokens = nn.Linear(8, 100), torch.arange(50)
        >>> hidden = torch.randn(50, 8)
        >>> worse = hidden.clone()
        >>> worse[:10] += 5  # the first of five samples only
        >>> original, other = (Predictions(states, head, tokens, tokens // 10) for states in (hidden, worse))
        >>> median_kl(original, other), round(mean_kl(original, other), 1)
        (0.0, 0.9)
    """
    return float(np.median(sample_kl(original, other)))


def sample_kl(original: Predictions, other: Predictions) -> np.ndarray:
    """Mean KL of the tokens of every sample that has some, float64 `[samples]`, in nats.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> head, hidden, samples = nn.Linear(8, 100), torch.randn(50, 8), torch.arange(50) // 10
        >>> original, other = (Predictions(states, head, samples, samples) for states in (hidden, 1.1 * hidden))
        >>> found = sample_kl(original, other)
        >>> found.shape, round(float(found.mean()), 4)
        ((5,), 0.0014)
    """
    found, rows = _divergences(original, other).numpy(), original.samples.numpy()
    count = np.bincount(rows)
    means: np.ndarray = np.bincount(rows, found)[count > 0] / count[count > 0]
    return means


def _divergences(original: Predictions, other: Predictions) -> Tensor:
    """KL(original || other) at every position, float64; see `mean_kl`."""
    found = []
    for (wanted, _), (got, _) in zip(original.logits(), other.logits(), strict=True):
        reference = wanted.log_softmax(-1)
        difference = got.log_softmax(-1).sub_(reference)
        terms = reference.exp_().mul_(torch.expm1(difference).sub_(difference))
        found.append(terms.sum(-1).double())
        _check_measure(float(found[-1].sum()))
    return torch.cat(found)


def exact_answers(predictions: Predictions, samples: int) -> np.ndarray:
    """Whether each token of a sample's reference answer, and its end, is the most likely one: bool `[samples]`.

    Greedy generation then gives exactly this answer. A sample without an answer counts as wrong.

    Example:
        >>> head = nn.Identity()
        >>> logits = torch.eye(4)  # predicts tokens 0, 1, 2, 3
        >>> predictions = Predictions(logits, head, torch.tensor([0, 1, 2, 0]), torch.tensor([0, 0, 1, 1]))
        >>> exact_answers(predictions, samples=2)
        array([ True, False])
    """
    right = torch.cat([_most_likely(logits) == targets for logits, targets in predictions.logits()]).numpy()
    rows = predictions.samples.numpy()
    total, correct = np.bincount(rows, minlength=samples), np.bincount(rows, right, minlength=samples)
    found: np.ndarray = (total > 0) & (correct == total)
    return found


def _most_likely(logits: Tensor) -> Tensor:
    """Token ids `[rows]` of logits `[rows, vocabulary]`; NaN is refused, whose largest value would be any token."""
    _check_measure(float(logits.abs().max()))
    return logits.argmax(-1)


def _check_measure(value: float) -> None:
    if not math.isfinite(value):
        raise NumericalError("The logits of a model that is measured hold NaN or infinity.", REMEDY)


def _window_batch(windows: Sequence[list[int]], length: int) -> Encoded:
    ids = np.zeros((len(windows), length), np.int64)
    mask = np.zeros((len(windows), length), np.int64)
    for row, window in enumerate(windows):
        ids[row, : len(window)] = window
        mask[row, : len(window)] = 1
    nowhere = np.zeros(ids.shape, bool)
    return Encoded(ids, mask, nowhere, nowhere)


def _last_hidden(loaded: LoadedModel, encoded: Encoded) -> Tensor:
    """Hidden states `[batch, sequence, hidden]` that leave the decoder; the head runs for the last position only."""
    found: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: object, output: Any) -> None:  # noqa: ANN401 - transformers' output classes
        found.append(output.last_hidden_state)

    decoder: Any = loaded.model.get_decoder()
    handle = decoder.register_forward_hook(keep)
    try:
        with torch.no_grad():
            loaded.model(**loaded.family.torch_inputs(encoded), use_cache=False, logits_to_keep=1)
    finally:
        handle.remove()
    return found[0]
