"""The pipeline answers as the engine does, whatever its caches hold, and however answers come."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

import qe_edge
from qe_edge.calibration.sources import load_evaluation
from qe_edge.models.family import Sample
from qe_edge.models.images import open_image
from qe_edge.runtime.engine import VisionLanguageEngine
from qe_edge.runtime.limits import EngineLimits
from qe_edge.runtime.pipeline import Pipeline
from qe_edge.system.errors import InputError, NumericalError, QEError
from tests.conftest import Exported

MOST = 6
FREE: dict[str, Any] = {"temperature": 1.5, "top_k": 0, "max_new_tokens": 12}


def obeying(engine: VisionLanguageEngine, **values: object) -> VisionLanguageEngine:
    """The same model with other settings in its generation_config.json."""
    rules = engine.manifest.generation.model_copy(update=values)
    manifest = engine.manifest.model_copy(update={"generation": rules})
    parts = (engine.family, engine.processor, engine._embedding, engine._sessions)
    return VisionLanguageEngine(manifest, *parts, max_context=256)


@pytest.fixture(scope="module")
def engine(exported: Exported) -> VisionLanguageEngine:
    """One that says more than a word."""
    engine = VisionLanguageEngine.load(exported.onnx, threads=1, max_context=256)
    return obeying(engine, min_new_tokens=12)


@pytest.fixture
def pipeline(engine: VisionLanguageEngine) -> Pipeline:
    return Pipeline(engine)


@pytest.fixture(scope="module")
def questions() -> list[Sample]:
    return load_evaluation("demo")[:12]


def counting(engine: VisionLanguageEngine, monkeypatch: pytest.MonkeyPatch, name: str) -> list[object]:
    """What a method of the engine is called with from now on."""
    calls: list[object] = []
    method = getattr(engine, name)

    def counted(*arguments: object, **options: object) -> object:
        calls.append(arguments)
        return method(*arguments, **options)

    monkeypatch.setattr(engine, name, counted)
    return calls


def test_answers_are_the_engines(engine: VisionLanguageEngine, pipeline: Pipeline, questions: list[Sample]) -> None:
    """One after the other, on a cache that holds the beginning of the last one; and as a list."""
    expected = [engine.generate_ids(engine.encode([sample]), MOST)[0] for sample in questions]
    found = [pipeline(sample, max_new_tokens=MOST) for sample in questions]
    assert [list(answer.token_ids) for answer in found] == expected
    assert [answer.timings.reused_tokens > 0 for answer in found] == [False] + [True] * 11
    together = pipeline([sample.question for sample in questions], [s.image for s in questions], max_new_tokens=MOST)
    assert [list(answer.token_ids) for answer in together] == expected
    assert {answer.finish_reason for answer in found} <= {"stop", "length"}


def test_what_a_cache_holds_changes_nothing(
    engine: VisionLanguageEngine, questions: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Conversations that share turns and pictures, and part in the words or in a picture, in any order."""
    one, other = (open_image(sample.pictures[0]) for sample in questions[:2])
    place = {"type": "image"}

    def asked(pictures: list[Any], *words: str) -> tuple[list[dict[str, Any]], list[Any]]:
        turns = [{"role": "user", "content": [place, {"type": "text", "text": words[0]}]}]
        for number, word in enumerate(words[1:]):
            turns.append({"role": "assistant" if number % 2 == 0 else "user", "content": word})
        if len(pictures) > 1:
            turns[-1] = {"role": "user", "content": [{"type": "text", "text": words[-1]}, place]}
        return turns, pictures

    conversations = [
        asked([one], "what shape is it?"),
        asked([one], "what shape is it?", "a circle", "what color is it?"),
        asked([one, other], "what shape is it?", "a circle", "and this?"),
        asked([one, one], "what shape is it?", "a circle", "and this?"),
        asked([other], "what shape is it?"),
        asked([other], "what shape is it?", "a circle", "what color is it?"),
        asked([one, other], "what shape is it?", "a circle", "and this?"),
        asked([one], "what color is it?"),
    ]
    visual = counting(engine, monkeypatch, "visual")
    shared = Pipeline(engine)
    found = [shared(*conversation, seed=3, **FREE) for conversation in conversations]
    assert len(visual) == 2  # pictures
    fresh = [Pipeline(engine)(*conversation, seed=3, **FREE) for conversation in conversations]
    assert [answer.token_ids for answer in found] == [answer.token_ids for answer in fresh]
    assert len({answer.token_ids for answer in fresh}) == 7
    reused = [answer.timings.reused_tokens for answer in found]
    prompts = [answer.timings.prompt_tokens for answer in found]
    assert reused[1] >= prompts[0] - 4
    assert reused[2] < reused[3] < prompts[3] - 8  # another picture at the end
    assert reused[4] < 8  # another picture at the beginning


def test_pieces_are_the_answer(pipeline: Pipeline, questions: list[Sample]) -> None:
    pieces = list(pipeline(questions[0], stream=True, seed=1, **FREE))
    answer = pipeline(questions[0], seed=1, **FREE)
    assert "".join(piece.text for piece in pieces) == answer.text
    assert tuple(token for piece in pieces for token in piece.token_ids) == answer.token_ids
    assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].finish_reason == answer.finish_reason
    assert len(pieces) > 3
    assert pipeline(questions[0], seed=2, **FREE).token_ids != answer.token_ids


def test_timings_add_up(pipeline: Pipeline, questions: list[Sample]) -> None:
    first = pipeline(questions[0], max_new_tokens=3).timings
    again = pipeline(questions[0], max_new_tokens=3).timings
    parts = first.waited + first.preprocessing + first.visual + first.merger + first.prefill
    assert 0 < parts <= first.first_token
    assert min(first.visual, first.merger, first.prefill, first.preprocessing) > 0
    assert again.visual == again.merger == 0
    assert again.reused_tokens == again.prompt_tokens - 1 == first.prompt_tokens - 1


def test_rows_of_a_list_are_drawn_as_alone(pipeline: Pipeline, questions: list[Sample]) -> None:
    """With different lengths, pictures or none, and ends at different times."""
    prompts: list[Any] = [questions[0], "what is the color of it?", questions[1], "?"]
    together = pipeline(prompts, seed=5, temperature=1.0, max_new_tokens=8)
    alone = [pipeline(prompt, seed=5, temperature=1.0, max_new_tokens=8) for prompt in prompts]
    assert [answer.token_ids for answer in together] == [answer.token_ids for answer in alone]
    assert [answer.text for answer in together] == [answer.text for answer in alone]


def test_the_end_of_an_answer(pipeline: Pipeline, questions: list[Sample]) -> None:
    whole = pipeline(questions[0], seed=1, **FREE)
    assert whole.finish_reason == "length"
    assert len(whole.token_ids) == 12
    stop = whole.text[8:11]
    cut = pipeline(questions[0], seed=1, stop=[stop, "never"], **FREE)
    assert (cut.text, cut.finish_reason) == (whole.text[: whole.text.index(stop)], "stop")
    assert whole.token_ids[: len(cut.token_ids)] == cut.token_ids
    full = pipeline("what is it?", max_new_tokens=None, seed=4, temperature=3.0, top_k=0, repetition_penalty=5.0)
    assert full.finish_reason == "stop" or len(full.token_ids) + full.timings.prompt_tokens == 256
    several = pipeline(["what is it?", "?"], seed=4, temperature=3.0, top_k=0, repetition_penalty=5.0)
    assert several[0].text.startswith(full.text) or full.text.startswith(several[0].text)


def test_a_cache_grows_with_what_is_asked(engine: VisionLanguageEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nobody chose a context, a prompt beyond the usual cache gets a larger one."""
    monkeypatch.setattr(engine, "_capacity", 32)
    pipeline = Pipeline(engine)
    prompts = ["what color is it? " * count for count in (2, 9, 2)]
    found = [pipeline(prompt, seed=1, **FREE) for prompt in prompts]
    assert [answer.token_ids for answer in found] == [Pipeline(engine)(p, seed=1, **FREE).token_ids for p in prompts]
    assert found[1].timings.prompt_tokens > 32


def test_max_context_holds_where_engines_take_more(engine: VisionLanguageEngine) -> None:
    rules = engine.manifest.generation.model_copy(update={"min_new_tokens": 200})
    manifest = engine.manifest.model_copy(update={"generation": rules})
    parts = (engine.family, engine.processor, engine._embedding, engine._sessions)
    limited = VisionLanguageEngine(manifest, *parts, EngineLimits(batch=1, context=128, prompt=64), max_context=40)
    answer = Pipeline(limited)("what color is it?")
    assert answer.timings.prompt_tokens + answer.timings.answer_tokens == 40


def test_cancelling_from_another_thread(pipeline: Pipeline, questions: list[Sample]) -> None:
    stream = pipeline(questions[0], stream=True, seed=1, **FREE)
    first = next(stream)
    thread = threading.Thread(target=stream.cancel)
    thread.start()
    thread.join()
    answer = stream.answer()
    assert answer.finish_reason == "cancelled"
    assert answer.text.startswith(first.text)
    assert len(answer.token_ids) < 12
    assert pipeline(questions[0], max_new_tokens=2).finish_reason  # its turn is free again


def test_an_answer_that_waits_can_be_cancelled(pipeline: Pipeline, questions: list[Sample]) -> None:
    running = pipeline(questions[0], stream=True, seed=1, **FREE)
    next(running)
    waiting = pipeline(questions[1], stream=True)
    with ThreadPoolExecutor() as pool:
        pending = pool.submit(waiting.answer)
        waiting.cancel()
        answer = pending.result(timeout=30)
    assert (answer.text, answer.finish_reason) == ("", "cancelled")
    running.close()


def test_one_thread_cannot_wait_for_itself(pipeline: Pipeline, questions: list[Sample]) -> None:
    stream = pipeline(questions[0], stream=True, seed=1, **FREE)
    next(stream)
    with pytest.raises(InputError, match="this thread began has not ended"):
        pipeline(questions[1])
    with stream:
        next(stream)
    assert list(stream) == []
    with pytest.raises(InputError, match="closed before its end"):
        stream.answer()
    assert pipeline(questions[1], max_new_tokens=2).text
    forgotten = pipeline(questions[0], stream=True, seed=1, **FREE)
    next(forgotten)
    del forgotten
    assert pipeline(questions[1], max_new_tokens=2).text


def test_threads_share_a_pipeline(engine: VisionLanguageEngine, questions: list[Sample]) -> None:
    """More of them than slots; every answer is the right one."""
    alone = [Pipeline(engine)(sample, seed=2, **FREE).token_ids for sample in questions]
    shared = Pipeline(engine, slots=2)
    with ThreadPoolExecutor(6) as pool:
        futures = [pool.submit(shared, sample, seed=2, **FREE) for sample in questions * 2]
        found = [future.result(timeout=120).token_ids for future in futures]
    assert found == alone * 2


def test_a_conversation_reads_each_turn_once(engine: VisionLanguageEngine, questions: list[Sample]) -> None:
    pipeline = Pipeline(engine)
    with pipeline.conversation(system="You see shapes.") as chat:
        first = chat("what shape is it?", questions[0].image, seed=1, **FREE)
        second = chat([{"type": "text", "text": "what color is it?"}], max_new_tokens=4)
        assert second.timings.reused_tokens >= first.timings.prompt_tokens
        messages: list[dict[str, Any]] = [
            {"role": "system", "content": "You see shapes."},
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what shape is it?"}]},
            {"role": "assistant", "content": first.text},
            {"role": "user", "content": "what color is it?"},
        ]
        expected = Pipeline(engine)(messages, questions[0].image, max_new_tokens=4)
        assert second.token_ids == expected.token_ids
        stream = chat("and now?", stream=True, seed=1, **FREE)
        next(stream)
        with pytest.raises(InputError, match="has not ended"):
            chat("again?")
        stream.close()
        assert len(chat.turns) == 5  # the closed turn is forgotten
        cancelled = chat("and now?", questions[1].image, stream=True, seed=1, **FREE)
        next(cancelled)
        cancelled.cancel()
        said = cancelled.answer().text
        assert [turn.text for turn in chat.turns[-2:]] == ["and now?", said]
        assert chat("?", max_new_tokens=2).timings.reused_tokens > second.timings.prompt_tokens
    with pytest.raises(InputError, match="closed"):
        chat("?")


def test_the_models_own_settings_count(engine: VisionLanguageEngine, questions: list[Sample]) -> None:
    given: dict[str, Any] = {"temperature": 1.5, "top_k": 0, "top_p": 0.9, "seed": 1, "max_new_tokens": 8}
    draws = {"do_sample": True, "temperature": 1.5, "top_k": 0, "top_p": 0.9}
    drawn = Pipeline(obeying(engine, **draws))(questions[0], seed=1, max_new_tokens=8)
    assert drawn.token_ids == Pipeline(engine)(questions[0], **given).token_ids
    likely = Pipeline(engine)(questions[0], max_new_tokens=8)
    assert (
        Pipeline(obeying(engine, **draws))(questions[0], temperature=0, max_new_tokens=8).token_ids == likely.token_ids
    )
    suppressed = Pipeline(obeying(engine, suppress_tokens=drawn.token_ids[:1]))(questions[0], **given)
    assert suppressed.token_ids[0] != drawn.token_ids[0]
    penalised = Pipeline(engine)(questions[0], repetition_penalty=1.4, **given)
    assert penalised.token_ids == Pipeline(obeying(engine, repetition_penalty=1.4))(questions[0], **given).token_ids


@pytest.mark.parametrize(
    ("prompt", "images", "options", "words"),
    [
        ("?", None, {"max_tokens": 3}, "no option 'max_tokens'"),
        ("?", None, {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ("?", None, {"max_new_tokens": 1000}, "together at most 256 fit"),
        ("?", None, {"temperature": -1}, "temperature is -1"),
        ("?", None, {"seed": -1}, "seed is -1"),
        ("?", None, {"stop": ""}, "stop string"),
        ("?", None, {"stop": 5}, "stop is 5"),
        ("?", None, {"stop": 0}, "stop is 0"),
        ("?", None, {"repetition_penalty": 0}, "repetition_penalty is 0"),
        ("?", None, {"repetition_penalty": 1e-50}, "repetition_penalty is 1e-50"),
        ("a " * 300, None, {}, "The prompt has"),
        ("?", "nowhere.png", {}, "no picture 'nowhere.png'"),
        ("?", "http://a/b.png", {}, "is an address"),
        ("?", b"no picture", {}, "not a picture"),
        (["?", "?"], ["a.png"], {}, "2 prompts"),
        (["?"], None, {"stream": True}, "do not come in pieces"),
        ([], None, {}, "nothing to answer"),
        (3, None, {}, "3 is no prompt"),
    ],
)
def test_what_cannot_be_asked(
    pipeline: Pipeline, prompt: str, images: str, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(QEError) as caught:
        pipeline(prompt, images, **options)
    assert words in caught.value.problem
    assert caught.value.remedy


def test_an_error_in_the_middle_leaves_no_trace(
    engine: VisionLanguageEngine, questions: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = Pipeline(engine)(questions[0], seed=1, **FREE)
    pipeline = Pipeline(engine)
    with monkeypatch.context() as broken:
        real, calls = engine.extend, iter(range(100))

        def extend(*arguments: object, **options: object) -> np.ndarray:
            logits = real(*arguments, **options)
            return logits * np.nan if next(calls) == 3 else logits

        broken.setattr(engine, "extend", extend)
        with pytest.raises(NumericalError):
            pipeline(questions[0], seed=1, **FREE)
    assert pipeline(questions[0], seed=1, **FREE).token_ids == expected.token_ids


def test_it_is_public(exported: Exported, questions: list[Sample]) -> None:
    pipeline = qe_edge.Pipeline.from_dir(exported.onnx, threads=1, max_context=128, slots=2)
    assert pipeline.slot_tokens == 128
    assert pipeline.slot_bytes == pipeline.engine.new_cache().nbytes
    assert pipeline(questions[0], max_new_tokens=2).text
    with pytest.raises(InputError, match="slots is 0"):
        Pipeline(pipeline.engine, slots=0)


def test_two_conversations_in_turn_keep_a_cache_each(engine: VisionLanguageEngine) -> None:
    """A template's first tokens, which all prompts share, are no reason to take another's cache."""
    pipeline = Pipeline(engine, slots=2)
    words = ["tell me something long about a red circle and a blue square", "what is one plus two, and why is it so"]
    first = [pipeline(text, max_new_tokens=2).timings for text in words]
    again = [pipeline(text, max_new_tokens=2).timings for text in words]
    assert all(timing.reused_tokens < timing.prompt_tokens / 2 for timing in first)
    assert all(timing.reused_tokens == timing.prompt_tokens - 1 for timing in again)
