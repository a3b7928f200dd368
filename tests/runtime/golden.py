"""Golden prompts and answers of a folder, for every runtime that reads it: Python, C++ and whatever comes.

`python -m tests.runtime.golden ENGINES OUT` writes `OUT/prompts.json` and its pictures as binary PPM files. For each
prompt the JSON has `turns` (role, and parts that are a `text` or the file of a `picture`), the `ids` of its tokens, and
`answers`: each with its settings and seed, the `ids` without the token that ended it, and `text`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from qe_edge.calibration.sources import load_evaluation
from qe_edge.models.family import Sample
from qe_edge.models.images import open_image
from qe_edge.models.samples import Turn
from qe_edge.runtime.embedding import TokenEmbedding
from qe_edge.runtime.folder_prompts import TOKENIZER, FolderPrompts, Prompt
from qe_edge.runtime.generation import adjust_logits
from qe_edge.runtime.language import LanguageEngine
from qe_edge.runtime.manifest import read_manifest
from qe_edge.runtime.sampling import Random, Sampling, choose_token
from qe_edge.runtime.sessions import OrtSession

QUESTIONS, FURTHER = 200, 50
MAX_NEW_TOKENS = 16
SAMPLED = (
    Sampling(temperature=1.0),
    Sampling(temperature=0.7, top_k=20, top_p=0.9),
    Sampling(temperature=1.5, min_p=0.05),
    Sampling(temperature=2.0, top_p=0.95),
)


class FolderEngine:
    """A folder's graphs in ONNX Runtime, without any family's code."""

    def __init__(self, folder: Path) -> None:
        self.manifest = read_manifest(folder)
        self.prompts = FolderPrompts(folder, self.manifest)
        self.tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
        self._sessions = {name: OrtSession(folder, entry, 0, 1) for name, entry in self.manifest.graphs.items()}
        embedding = TokenEmbedding(folder, self.manifest.vocab_size, self.manifest.hidden_size)
        self._language = LanguageEngine(self.manifest, embedding, {"language": self._sessions["language"]})

    def answer(self, prompt: Prompt, sampling: Sampling, seed: int) -> list[int]:
        """Tokens of one answer, without the one that ended it."""
        engine, random = self._language, Random(seed)
        cache = engine.new_cache(capacity=prompt.ids.shape[1] + MAX_NEW_TOKENS)
        embeds = engine.embed(prompt.ids, self._features(prompt), prompt.image_mask)
        length = np.array([prompt.ids.shape[1]])
        logits = engine.extend(cache, embeds, prompt.positions, length, numbers=prompt.numbers)
        tokens = prompt.ids
        found: list[int] = []
        following = prompt.positions.max() + 1
        while True:
            rules = self.manifest.generation
            scores = adjust_logits(rules, logits, tokens, np.ones_like(tokens), len(found))
            token = choose_token(scores[0].astype(np.float64), sampling, random)
            if token in self.manifest.eos_token_ids:
                return found
            found.append(token)
            if len(found) == MAX_NEW_TOKENS:
                return found
            step = np.array([[token]])
            tokens = np.concatenate((tokens, step), axis=1)
            positions = np.full((*prompt.positions.shape[:-1], 1), following + len(found) - 1)
            logits = engine.extend(cache, engine.embed(step), positions, np.ones(1, np.int64))

    def _features(self, prompt: Prompt) -> np.ndarray | None:
        if not prompt.feeds:
            return None
        merged: list[Any] = []
        for feeds in prompt.feeds:
            (hidden,) = self._sessions["visual"].run(feeds).values()
            name = self.manifest.graphs["merger"].inputs[0].name
            merged += self._sessions["merger"].run({name: hidden}).values()
        return np.concatenate([np.asarray(features) for features in merged])


def further_samples(samples: Sequence[Sample]) -> Iterator[Sample]:
    """Conversations of several turns, several pictures, pictures inside the text, and texts alone; without end."""
    number = 0
    while True:
        one, two, three = (samples[(number * 7 + step) % len(samples)] for step in (0, 101, 203))
        said = Turn("assistant", one.answer or "yes")
        asked = Turn("user", one.question, (0,))
        yield Sample((*one.pictures, *two.pictures), two.question, earlier=(asked, said), marks=(0,))
        yield Sample((*one.pictures, *two.pictures, *three.pictures), three.question)
        yield Sample(None, f"{one.question} {two.question}")
        yield Sample(one.image, f"Look: here. {one.question}", marks=(6,))
        rule = Turn("system", "Answer in one word. Écris: «été» 😀")
        yield Sample(one.image, "And why <|im_end|>?", earlier=(rule, asked, said))
        number += 1


def chosen_samples(questions: int, further: int) -> list[Sample]:
    """The demo's first questions, then conversations made of them."""
    samples = load_evaluation("demo")
    return [*samples[:questions], *islice(further_samples(samples), further)]


def write_golden(folder: Path, out: Path, questions: int = QUESTIONS, further: int = FURTHER) -> None:
    """Write prompts and answers of the demo's questions and of conversations made of them.

    Args:
        folder: ONNX folder, or engines for the target `cpu`.
        out: Folder to write into.
        questions: How many of the demo's.
        further: How many conversations.
    """
    out.mkdir(parents=True, exist_ok=True)
    engine = FolderEngine(folder)
    prompts = [_golden(engine, one, out, number) for number, one in enumerate(chosen_samples(questions, further))]
    text = json.dumps({"max_new_tokens": MAX_NEW_TOKENS, "prompts": prompts}, ensure_ascii=False, indent=1)
    (out / "prompts.json").write_text(text + "\n", encoding="utf-8")


def _golden(engine: FolderEngine, sample: Sample, out: Path, number: int) -> dict[str, Any]:
    pictures = [np.asarray(open_image(picture)) for picture in sample.pictures]
    files = [f"{number:03}-{place}.ppm" for place in range(len(pictures))]
    for file, pixels in zip(files, pictures, strict=True):
        header = f"P6\n{pixels.shape[1]} {pixels.shape[0]}\n255\n".encode()
        (out / file).write_bytes(header + pixels.tobytes())
    prompt = engine.prompts.read(sample.conversation, pictures)
    settings = [(Sampling(), 0), *((SAMPLED[(number + step) % len(SAMPLED)], number * 2 + step) for step in (0, 1))]
    answers = []
    for sampling, seed in settings:
        ids = engine.answer(prompt, sampling, seed)
        text = engine.tokenizer.decode(ids, skip_special_tokens=True)
        answers.append({**vars(sampling), "seed": seed, "ids": ids, "text": text})
    waiting = iter(files)
    turns = [{"role": turn.role, "parts": _parts(turn, waiting)} for turn in sample.conversation]
    return {"turns": turns, "ids": prompt.ids[0].tolist(), "answers": answers}


def _parts(turn: Turn, files: Iterator[str]) -> list[dict[str, str]]:
    parts = []
    for number, (start, end) in enumerate(zip((0, *turn.marks), (*turn.marks, len(turn.text)), strict=True)):
        if number:
            parts.append({"picture": next(files)})
        if end > start:
            parts.append({"text": turn.text[start:end]})
    return parts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engines", type=Path)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    write_golden(given.engines, given.out)
