"""Layers that keep a state of fixed size: no prefix, turn, slot, padding or cancelling makes a wrong answer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qe_edge.deploy.order import make_order
from qe_edge.export.build import build_engines
from qe_edge.export.cached_attention import expand_cached_attention
from qe_edge.export.lowering.delta_rule import expand_delta_rule
from qe_edge.export.lowering.inline import inline_layers
from qe_edge.models.family import TEXT, Sample
from qe_edge.models.samples import Turn
from qe_edge.recipes.recipe import make_recipe
from qe_edge.runtime.cache import right_places, take_tokens
from qe_edge.runtime.engine import VisionLanguageEngine
from qe_edge.runtime.manifest import read_manifest
from qe_edge.runtime.pipeline import Pipeline
from qe_edge.system.errors import ArtifactError, InputError
from tests.runtime.conftest import StateExports

NEW = 6
ASKED = [
    Sample(None, "what color is the shape?"),
    Sample(None, "what color is the shape in the image?"),
    Sample(None, "what color is the shape?"),
    Sample(None, "what color"),
    Sample(None, "why?", earlier=(Turn("user", "what color is the shape?"), Turn("assistant", "teal"))),
]
PROMPTS = [Sample(None, "is there a red shape in the image? " * 2, kind=TEXT), Sample(None, "why?", kind=TEXT)]


@pytest.fixture(scope="module", params=["lfm2", "qwen3.5"])
def folder(request: pytest.FixtureRequest, state_exports: StateExports) -> Path:
    return state_exports(request.param)


@pytest.fixture(scope="module", params=["cpu", "standard operators"])
def engine(
    request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> VisionLanguageEngine:
    out = tmp_path_factory.mktemp("engines") / "engine"
    if request.param == "cpu":
        return VisionLanguageEngine.load(build_engines(folder / "onnx", out, "cpu"), threads=1)
    return VisionLanguageEngine.load(standard(folder / "onnx", out), threads=1)


def standard(onnx: Path, out: Path) -> Path:
    """An ONNX folder whose language graph is what TensorRT computes, in float32."""
    model = ir.load(shutil.copytree(onnx, out) / "language.onnx")
    expand_cached_attention(model)
    expand_delta_rule(model)
    inline_layers(model)
    ir.external_data.load_to_model(model)
    ir.save(model, out / "language.onnx", external_data="language.onnx.data")
    manifest = read_manifest(onnx)
    kv = manifest.kv.model_copy(update={"in_place": False})
    manifest.model_copy(update={"kv": kv}).write(out)
    return out


@pytest.fixture(scope="module")
def alone(engine: VisionLanguageEngine) -> list[list[int]]:
    """The answers, each from an empty cache."""
    return [engine.generate_ids(engine.encode([sample]), NEW)[0] for sample in ASKED]


def rows_of(engine: VisionLanguageEngine) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Embeddings, positions and lengths of two prompts of different lengths, right-padded."""
    encoded = engine.encode(PROMPTS)
    places = right_places(encoded.attention_mask)
    embeds = take_tokens(engine.embed(encoded.input_ids), places, 0)
    return embeds, take_tokens(engine.family.position_ids(encoded), places, 0), encoded.attention_mask.sum(1)


def close(found: np.ndarray, wanted: np.ndarray) -> bool:
    return bool(np.abs(found - wanted).max() < 1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("first", [(5, 1), (1, 2), (7, 2)], ids=str)
def test_pieces_of_rows_of_different_lengths_give_what_the_whole_gives(
    engine: VisionLanguageEngine, first: tuple[int, int]
) -> None:
    embeds, positions, lengths = rows_of(engine)
    wanted = engine.extend(engine.new_cache(2, 64), embeds, positions, lengths, logits="all")
    cache, start = engine.new_cache(2, 64), np.array(first)
    most = int(start.max())
    found = engine.extend(cache, embeds[:, :most], positions[:, :most], start, logits="all")
    assert all(close(found[row, :count], wanted[row, :count]) for row, count in enumerate(first))
    rest = lengths - start
    places = np.minimum(start[:, None] + np.arange(rest.max()), embeds.shape[1] - 1)
    found = engine.extend(cache, take_tokens(embeds, places, 0), take_tokens(positions, places, 0), rest, logits="all")
    for row, (before, count) in enumerate(zip(first, rest, strict=True)):
        assert close(found[row, :count], wanted[row, before : before + count]), row


def test_a_cache_is_emptied_and_never_cut(engine: VisionLanguageEngine) -> None:
    embeds, positions, lengths = rows_of(engine)
    cache = engine.new_cache(2, 64)
    wanted = engine.extend(cache, embeds, positions, lengths)
    with pytest.raises(InputError, match="cannot be cut to 3"):
        cache.truncate(3)
    cache.truncate(int(lengths.max()))
    assert cache.lengths.tolist() == lengths.tolist()
    cache.truncate(0)
    assert close(engine.extend(cache, embeds, positions, lengths), wanted)


@pytest.mark.parametrize("slots", [1, 2])
def test_earlier_prompts_change_no_answer(engine: VisionLanguageEngine, alone: list[list[int]], slots: int) -> None:
    pipeline = Pipeline(engine, slots=slots)
    for order in (range(len(ASKED)), reversed(range(len(ASKED)))):
        for index in order:
            answer = pipeline(ASKED[index], max_new_tokens=NEW)
            assert list(answer.token_ids) == alone[index]
    together = pipeline(ASKED, max_new_tokens=NEW)
    assert [list(answer.token_ids) for answer in together] == alone


def test_a_turn_is_read_on_and_a_prompt_that_is_cut_is_read_again(engine: VisionLanguageEngine) -> None:
    pipeline = Pipeline(engine)
    with pipeline.conversation() as chat:
        first = chat("what color is the shape?", max_new_tokens=2)
        second = chat("why?", max_new_tokens=NEW)
    assert second.timings.reused_tokens == first.timings.prompt_tokens + first.timings.answer_tokens - 1
    turns = (Turn("user", "what color is the shape?"), Turn("assistant", first.text))
    asked = Sample(None, "why?", earlier=turns)
    assert list(second.token_ids) == engine.generate_ids(engine.encode([asked]), NEW)[0]
    assert pipeline(ASKED[0], max_new_tokens=NEW).timings.reused_tokens == 0
    assert pipeline(ASKED[0], max_new_tokens=NEW).timings.reused_tokens == 0


def test_an_answer_that_is_cancelled_leaves_a_cache_that_answers_rightly(
    engine: VisionLanguageEngine, alone: list[list[int]]
) -> None:
    pipeline = Pipeline(engine)
    for tokens in (0, 1, 3):
        stream = pipeline(ASKED[0], max_new_tokens=NEW, stream=True)
        for _ in range(tokens):
            next(stream)
        stream.cancel()
        list(stream)
        for index in (4, 0):
            assert list(pipeline(ASKED[index], max_new_tokens=NEW).token_ids) == alone[index]


def test_a_call_that_fails_leaves_no_trace(
    engine: VisionLanguageEngine, alone: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline, session = Pipeline(engine), engine._sessions["language"]
    calls, run = [], session.run

    def failing(*arguments: Any) -> Any:  # noqa: ANN401 - a session's
        found = run(*arguments)
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError
        return found

    monkeypatch.setattr(session, "run", failing)
    with pytest.raises(MemoryError):
        pipeline(ASKED[0], max_new_tokens=NEW)
    for index in (0, 4):
        assert list(pipeline(ASKED[index], max_new_tokens=NEW).token_ids) == alone[index]


def test_logits_are_those_of_the_exported_graph(engine: VisionLanguageEngine, folder: Path) -> None:
    exported = VisionLanguageEngine.load(folder / "onnx", threads=1)
    samples = [*PROMPTS, Sample(None, "is there a red shape? " * 40, kind=TEXT)]
    for batch in (samples[:1], samples):
        encoded = exported.encode(batch)
        valid = encoded.attention_mask == 1
        assert close(engine.logits(encoded)[valid], exported.logits(encoded)[valid])


@pytest.mark.parametrize("target", ["cuda", "rtx", "jetson-orin"])
def test_no_target_refuses_states(folder: Path, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qe_edge.deploy.order.check_targets", list)
    assert make_order(str(folder / "model"), make_recipe(method="rtn"), ["cpu", target]).targets == ("cpu", target)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda spec: spec.update(shape=["batch", 96, "capacity"]), "has the shape"),
        (lambda spec: spec.update(shape=["batch", 0, 2]), "has the shape"),
        (lambda spec: spec.update(shape=["batch", 1 << 62, 2]), "has the shape"),
        (lambda spec: spec.update(name="past_key_values.0.other"), "has no output"),
        (lambda spec: spec.update(name="past_key_values.0.key"), "has no output"),
    ],
)
def test_a_manifest_whose_states_cannot_be_kept_is_refused(
    folder: Path,
    tmp_path: Path,
    change: Callable[[dict[str, Any]], None],
    reason: str,
) -> None:
    values = json.loads((folder / "onnx" / "manifest.json").read_text())
    inputs = values["graphs"]["language"]["inputs"]
    name = "past_key_values.0.conv"
    spec = next(spec for spec in inputs if spec["name"] == name)
    change(spec)
    for profile in values["graphs"]["language"]["profiles"].values():
        profile[spec["name"]] = profile.pop(name)
    (tmp_path / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(ArtifactError, match=reason):
        read_manifest(tmp_path)
