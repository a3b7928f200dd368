from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from qe_edge.errors import InputError
from qe_edge.models.family import Sample
from qe_edge.runtime.engine import VisionLanguageEngine
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
