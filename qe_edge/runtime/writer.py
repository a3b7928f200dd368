"""One answer while it is written: tokens are chosen, become text, and end it."""

from __future__ import annotations

from typing import Any

import numpy as np

from qe_edge.runtime.answer_options import AnswerOptions
from qe_edge.runtime.answers import FinishReason
from qe_edge.runtime.detokenizer import Detokenizer, StopStrings
from qe_edge.runtime.generation import adjust_logits, check_finite
from qe_edge.runtime.sampling import Random, choose_token


class AnswerWriter:
    """Chooses the tokens of one answer.

    Args:
        prompt: Tokens of the prompt, int64 `[tokens]`.
        room: Most tokens of the answer.
        options: Options of the answer.
        tokenizer: A tokenizer of transformers that nobody else changes.

    Attributes:
        ids: Tokens so far.
        finish_reason: Why the answer ended; None before.

    Example:
        >>> from transformers import AutoTokenizer
        >>> from qe_edge.demo import model_path
        >>> from qe_edge.runtime.answer_options import answer_options
        >>> from qe_edge.runtime.generation import GenerationSettings
        >>> tokenizer = AutoTokenizer.from_pretrained(model_path())
        >>> options = answer_options(GenerationSettings(eos_token_ids=(0,), pad_token_id=0), {})
        >>> writer = AnswerWriter(np.array([5, 6]), room=2, options=options, tokenizer=tokenizer)
        >>> likely = np.zeros(len(tokenizer), np.float32)
        >>> likely[tokenizer("red")["input_ids"][0]] = 9.0  # the most likely token, twice
        >>> text = writer.take(likely) + writer.take(likely)
        >>> len(writer.ids), writer.finish_reason, "red" in text
        (2, 'length', True)
    """

    def __init__(self, prompt: np.ndarray, room: int, options: AnswerOptions, tokenizer: Any) -> None:  # noqa: ANN401
        self.ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self._options = options
        self._room = room
        self._history = np.concatenate((prompt, np.zeros(room, np.int64)))
        self._prompt = len(prompt)
        self._random = Random(options.seed)
        self._text, self._stops = Detokenizer(tokenizer), StopStrings(options.stop)

    @property
    def ended(self) -> bool:
        """Whether the answer has ended."""
        return self.finish_reason is not None

    def take(self, logits: np.ndarray) -> str:
        """Choose the next token.

        Args:
            logits: float32 `[vocabulary]`.

        Returns:
            Text that it adds to the answer.

        Raises:
            NumericalError: If logits are not finite.
        """
        check_finite(logits, "The logits of the engine")
        rules, new = self._options.rules, len(self.ids)
        history = self._history[None, : self._prompt + new]
        scores = adjust_logits(rules, logits[None], history, np.ones_like(history), new)
        token = choose_token(scores[0], self._options.sampling, self._random)
        if token in rules.eos_token_ids:
            return self.end("stop")
        self._history[self._prompt + new] = token
        self.ids.append(token)
        text = self._stops.add(self._text.add(token))
        if self._stops.found:
            self.finish_reason = "stop"
        elif len(self.ids) == self._room:
            text += self.end("length")
        return text

    def end(self, reason: FinishReason) -> str:
        """End the answer; returns the text that was held back."""
        text = self._stops.add(self._text.finish())
        text += self._stops.finish()
        self.finish_reason = "stop" if self._stops.found else reason
        return text
