from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qe_edge.models.family import Sample
from qe_edge.models.quantized import load_quantized
from qe_edge.runtime.engine import VisionLanguageEngine
from qe_edge.system.errors import ArtifactError, InputError, NumericalError
from qe_edge.validate.subjects import TorchSubject, in_float32
from tests.conftest import Exported


@pytest.fixture(scope="module")
def engine(exported: Exported) -> VisionLanguageEngine:
    return VisionLanguageEngine.load(exported.onnx, threads=1)


def test_a_batch_gives_what_its_rows_give(engine: VisionLanguageEngine, held_out: list[Sample]) -> None:
    """Padding and other rows change nothing, whatever the lengths of prompts and answers."""
    together = engine.generate_ids(engine.encode(held_out), 6)
    alone = [engine.generate_ids(engine.encode([sample]), 6)[0] for sample in held_out]
    assert together == alone
    assert len(set(engine.encode(held_out).attention_mask.sum(1).tolist())) > 1


def test_decoding_step_by_step_is_teacher_forcing(engine: VisionLanguageEngine, held_out: list[Sample]) -> None:
    encoded = engine.encode(held_out[:2])
    logits, state = engine.prefill(encoded, engine.merger(engine.visual(encoded)))
    tokens = np.array([3, 9])
    following = [logits[:, -1], *(engine.decode(state, tokens + step)[:, 0] for step in range(3))]
    assert state.step == 3
    assert state.attention_mask.shape[1] == encoded.input_ids.shape[1] + 3

    forced = np.concatenate((encoded.input_ids, np.stack([tokens + step for step in range(3)], 1)), 1)
    pad = ((0, 0), (0, 3))
    longer = type(encoded)(
        forced,
        np.pad(encoded.attention_mask, pad, constant_values=1),
        np.pad(encoded.image_mask, pad),
        np.pad(encoded.answer_mask, pad),
        encoded.pixels,
    )
    expected = engine.logits(longer)[:, -4:]
    # 8-bit codes close to a half fall either way
    assert np.linalg.norm(np.stack(following, 1) - expected) / np.linalg.norm(expected) < 5e-3


def test_several_tokens_at_once(engine: VisionLanguageEngine, held_out: list[Sample]) -> None:
    encoded = engine.encode(held_out[:2])
    features = engine.features(encoded)
    tokens = np.array([[3, 4, 5], [9, 8, 7]], np.int32)
    one_by_one, state = engine.prefill(encoded, features)[1], engine.prefill(encoded, features)[1]
    expected = [engine.decode(one_by_one, column) for column in tokens.T]
    found = engine.decode(state, tokens)
    assert found.shape[:2] == (2, 3)
    assert np.array_equal(found, np.concatenate(expected, axis=1))
    assert np.array_equal(state.tokens[:, -3:], tokens)


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (np.array([3]), "shape [1] cannot be fed to a batch of 2"),
        (np.zeros((2, 0), np.int64), "shape [2, 0]"),
        (np.zeros((2, 1, 1), np.int64), "shape [2, 1, 1]"),
        (np.array([1.0, 2.0]), "float64 are no token ids"),
        (np.array([1, -1]), "outside the vocabulary"),
        (np.array([1, 1 << 20]), "outside the vocabulary"),
        (np.ones((2, 5000), np.int64), "answer up to 5000"),
    ],
)
def test_tokens_that_cannot_be_fed(
    engine: VisionLanguageEngine, held_out: list[Sample], tokens: np.ndarray, words: str
) -> None:
    state = engine.prefill(encoded := engine.encode(held_out[:2]), engine.features(encoded))[1]
    with pytest.raises(InputError) as caught:
        engine.decode(state, tokens)
    assert words in caught.value.problem
    assert state.step == 0


def test_the_context_of_an_engine(engine: VisionLanguageEngine, held_out: list[Sample]) -> None:
    encoded = engine.encode(held_out[:1])
    with pytest.raises(InputError, match="together at most"):
        engine.generate_ids(encoded, engine.manifest.max_context)


def test_an_engine_and_pytorch_follow_the_same_rules(
    exported: Exported, engine: VisionLanguageEngine, held_out: list[Sample]
) -> None:
    rules = engine.manifest.generation.model_copy(
        update={"min_new_tokens": 5, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "suppress_tokens": (11,)}
    )
    loaded = in_float32(load_quantized(exported.checkpoint))
    encoded = engine.encode(held_out[:2])
    obeying = VisionLanguageEngine(
        engine.manifest.model_copy(update={"generation": rules}),
        engine.family,
        engine.processor,
        engine._embedding,
        engine._sessions,
    )
    answers = obeying.generate_ids(encoded, 8)
    assert answers == TorchSubject(loaded, rules).generate_ids(encoded, 8)
    assert min(map(len, answers)) >= 5
    assert answers != engine.generate_ids(encoded, 8)


def test_logits_that_are_not_finite(engine: VisionLanguageEngine, held_out: list[Sample]) -> None:
    encoded = engine.encode(held_out[:1])
    logits, state = engine.prefill(encoded, engine.features(encoded))
    logits[0, -1, 4] = np.nan
    with pytest.raises(NumericalError, match="The logits of the engine are not finite"):
        engine.next_tokens(logits, state)


def test_teacher_forced_logits_that_are_not_finite(
    exported: Exported, held_out: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = VisionLanguageEngine.load(exported.onnx, threads=1)
    encoded = engine.encode(held_out[:2])
    read = engine._read

    def poisoned(*arguments: Any) -> np.ndarray:  # noqa: ANN401 - as it is called
        logits = read(*arguments)
        logits[1, 3, 4] = np.inf
        return logits

    assert np.isfinite(engine.logits(encoded)).all()
    monkeypatch.setattr(engine, "_read", poisoned)
    with pytest.raises(NumericalError, match="The logits of the engine are not finite"):
        engine.logits(encoded)


def test_a_graph_that_computes_another_shape(exported: Exported, held_out: list[Sample]) -> None:
    engine = VisionLanguageEngine.load(exported.onnx, threads=1)
    encoded = engine.encode(held_out[:1])
    features = engine.features(encoded)
    assert features is not None
    with pytest.raises(ArtifactError, match="The graph 'merger' computes the shape") as caught:
        engine.prefill(encoded, features[:, :-1])
    assert caught.value.remedy == "Export and build the model again."
    engine.manifest = engine.manifest.model_copy(update={"vocab_size": engine.manifest.vocab_size + 1})
    with pytest.raises(ArtifactError, match="The graph 'language' computes the shape"):
        engine.prefill(encoded, features)


def test_answers_end_and_have_a_limit(engine: VisionLanguageEngine, held_out: list[Sample]) -> None:
    ids = engine.generate_ids(engine.encode(held_out), 30)
    assert not {token for row in ids for token in row} & set(engine.manifest.eos_token_ids)
    assert engine.generate_ids(engine.encode(held_out), 1) == [row[:1] for row in ids]
    texts = engine.generate(held_out, 30)
    assert texts == [engine.processor.tokenizer.decode(row, skip_special_tokens=True).strip() for row in ids]


def test_level_4_is_close_to_exact(exported: Exported, engine: VisionLanguageEngine, held_out: list[Sample]) -> None:
    fast = VisionLanguageEngine.load(exported.onnx, threads=1, accuracy_level=4)
    encoded = engine.encode(held_out[:2])
    exact, quick = engine.logits(encoded), fast.logits(encoded)
    assert 0 < np.linalg.norm(exact - quick) / np.linalg.norm(exact) < 0.2


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda folder, _: VisionLanguageEngine.load(folder, accuracy_level=2), "no accuracy level 2"),
        (lambda folder, _: VisionLanguageEngine.load(folder, threads=0), "0 threads"),
        (lambda _, engine: engine.encode([]), "nothing to answer"),
        (lambda _, engine: engine.generate([Sample(Path("nosuch.png"), "what?")]), "no picture 'nosuch.png'"),
    ],
)
def test_what_cannot_be_asked(
    exported: Exported,
    engine: VisionLanguageEngine,
    call: Callable[[Path, VisionLanguageEngine], object],
    words: str,
) -> None:
    with pytest.raises(InputError, match=words):
        call(exported.onnx, engine)


def test_features_of_another_batch(engine: VisionLanguageEngine, held_out: list[Sample]) -> None:
    encoded = engine.encode(held_out[:2])
    features = engine.features(encoded)
    assert features is not None
    for wrong in (features[:-1], None):
        with pytest.raises(InputError, match="image features for"):
            engine.prefill(encoded, wrong)


def test_torch_is_not_needed(exported: Exported) -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from qe_edge.models.family import Sample\n"
        "from qe_edge.runtime.engine import VisionLanguageEngine\n"
        "from PIL import Image\n"
        f"engine = VisionLanguageEngine.load({str(exported.onnx)!r}, threads=1)\n"
        "print(engine.generate([Sample(Image.new('RGB', (64, 64), 'red'), 'what color is the shape?')], 8))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("['")
