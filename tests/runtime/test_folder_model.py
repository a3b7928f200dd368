"""Without transformers an engine answers as it does with it, from the files of its folder."""

from __future__ import annotations

import importlib.util
from importlib.machinery import ModuleSpec
from pathlib import Path

import numpy as np
import pytest

from qe_edge.models.family import Sample
from qe_edge.models.samples import Turn
from qe_edge.runtime.engine import VisionLanguageEngine
from qe_edge.runtime.folder_model import FolderModel
from qe_edge.runtime.folder_prompts import open_tokenizer
from qe_edge.runtime.pipeline import Pipeline
from qe_edge.system.errors import ArtifactError, InputError
from tests.conftest import Exported


@pytest.fixture(scope="module")
def engines(exported: Exported) -> tuple[VisionLanguageEngine, VisionLanguageEngine]:
    """With the model's family, and without."""

    def find(name: str) -> ModuleSpec | None:
        return None if name == "transformers" else importlib.util.find_spec(name)

    with pytest.MonkeyPatch.context() as patch:
        whole = VisionLanguageEngine.load(exported.onnx, threads=1, max_context=512)
        patch.setattr("qe_edge.runtime.engine.find_spec", find)
        bare = VisionLanguageEngine.load(exported.onnx, threads=1, max_context=512)
    assert isinstance(bare.family, FolderModel)
    return whole, bare


@pytest.fixture(scope="module")
def asked(samples: list[Sample]) -> list[Sample]:
    """A picture, none, two of other sizes, and a conversation."""
    first, second = samples[0].pictures[0], samples[1].pictures[0]
    wide = np.tile(np.arange(90, dtype=np.uint8)[:, None, None], (1, 200, 3))
    return [
        Sample(first, "what color is the shape?"),
        Sample(None, "what is <|im_end|>?"),
        Sample([wide, second], "which is a circle?"),
        Sample(first, "and now?", earlier=(Turn("system", "Be short."), Turn("user", "hi"), Turn("assistant", "ho"))),
    ]


def test_batches_are_the_same_to_the_last_bit(
    engines: tuple[VisionLanguageEngine, VisionLanguageEngine], asked: list[Sample]
) -> None:
    whole, bare = engines
    known, found = whole.encode(asked), bare.encode(asked)
    for name in ("input_ids", "attention_mask", "image_mask"):
        np.testing.assert_array_equal(getattr(found, name), getattr(known, name), err_msg=name)
    valid = known.attention_mask.astype(bool)
    positions, wanted = bare.family.position_ids(found), whole.family.position_ids(known)  # type: ignore[arg-type]
    np.testing.assert_array_equal(positions[..., valid], wanted[..., valid])
    np.testing.assert_array_equal(bare.family.graph_mask(found), whole.family.graph_mask(known))
    feeds = zip(bare.family.visual_feeds(found), whole.family.visual_feeds(known), strict=True)
    for one, other in feeds:
        assert set(one) == set(other)
        for name in one:
            np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def test_answers_and_conversations_are_the_same(
    engines: tuple[VisionLanguageEngine, VisionLanguageEngine], asked: list[Sample]
) -> None:
    whole, bare = (Pipeline(engine) for engine in engines)
    drawn = {"max_new_tokens": 6, "temperature": 1.0, "seed": 3}
    for sample in [*asked, asked[0]]:  # the last picture is remembered by then
        assert bare(sample, **drawn).token_ids == whole(sample, **drawn).token_ids
        assert bare(sample, max_new_tokens=6).text == whole(sample, max_new_tokens=6).text
    assert [one.token_ids for one in bare(asked, max_new_tokens=4)] == [
        one.token_ids for one in whole(asked, max_new_tokens=4)
    ]


def test_what_it_cannot_do_says_how(engines: tuple[VisionLanguageEngine, VisionLanguageEngine]) -> None:
    for sample, answers in ((Sample(None, "running text", kind="text"), False), (Sample(None, "q", "a"), True)):
        with pytest.raises(InputError, match="Without transformers") as caught:
            engines[1].encode([sample], answers=answers)
        assert "qe-edge[quantize]" in caught.value.remedy


@pytest.mark.parametrize("text", [None, "", "{}", '{"model": {"type": "BPE"}}'])
def test_a_tokenizer_that_cannot_be_read_is_named(text: str | None, tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ArtifactError, match=r"tokenizer\.json") as caught:
        open_tokenizer(file)
    assert caught.value.remedy == "Export or build the model again."
