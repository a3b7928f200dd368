"""What a line of a JSONL file may say; everything else is refused by file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qe_edge.calibration.captions import CAPTION_PROMPT
from qe_edge.calibration.sources import hash_samples, read_jsonl
from qe_edge.models.samples import TEXT, Sample, Turn
from qe_edge.models.videos import Video
from qe_edge.system.errors import CalibrationError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the pictures "p.png" and "q.png", and one outside it."""
    inside = tmp_path / "data"
    inside.mkdir()
    for path, color in ((inside / "p.png", "red"), (inside / "q.png", "blue"), (tmp_path / "outside.png", "teal")):
        Image.new("RGB", (8, 8), color).save(path)
    return inside.resolve()


def read(folder: Path, line: object) -> Sample:
    path = folder / "lines.jsonl"
    text = line if isinstance(line, str) else json.dumps(line)
    path.write_text(f'{{"text": "first"}}\n\n{text}\n', encoding="utf-8")
    samples = read_jsonl(path)
    assert len(samples) == 2
    assert samples[1].origin == f"Line 3 of '{path}'"
    return samples[1]


def refusal(folder: Path, line: object) -> str:
    with pytest.raises(CalibrationError) as caught:
        read(folder, line)
    assert "Line 3 of" in caught.value.problem
    assert "lines.jsonl" in caught.value.problem
    assert caught.value.remedy
    return str(caught.value)


@pytest.mark.parametrize("pictures", [{"images": ["p.png", "q.png"]}, {"image": ["p.png", "q.png"]}])
def test_several_pictures(folder: Path, pictures: dict[str, Any]) -> None:
    sample = read(folder, {**pictures, "question": "which is red?"})
    assert sample == Sample([folder / "p.png", folder / "q.png"], "which is red?")
    marked = read(folder, {**pictures, "question": "is <image> redder than <image>?\n"})
    assert marked == Sample(sample.pictures, "is  redder than ?\n", marks=(3, 16))
    assert read(folder, {**pictures, "question": "<image>\n<image>\nwhich?"}) == Sample(sample.pictures, "which?")
    assert read(folder, {**pictures, "question": "which? <image><image>"}).marks == (6, 6)


@pytest.mark.parametrize("image", [{"image": "p.png"}, {"images": ["p.png"]}, {"image": ["p.png"], "images": None}])
def test_one_picture_in_any_form(folder: Path, image: dict[str, Any]) -> None:
    assert read(folder, {**image, "id": 3, "source": "x"}) == Sample(folder / "p.png", CAPTION_PROMPT)
    assert read(folder, {"image": None, "images": [], "question": "?"}) == Sample(None, "?")


def test_conversations_of_llava(folder: Path) -> None:
    turns = [
        {"from": "system", "value": "be brief"},
        {"from": "human", "value": "<image>\nwhat is it?"},
        {"from": "gpt", "value": "a square"},
        {"from": "human", "value": "and its color?"},
        {"from": "gpt", "value": "red"},
    ]
    earlier = (Turn("system", "be brief"), Turn("user", "what is it?", (0,)), Turn("assistant", "a square"))
    wanted = Sample(folder / "p.png", "and its color?", "red", earlier=earlier)
    assert read(folder, {"id": "7", "image": "p.png", "conversations": turns}) == wanted
    open_end = read(folder, {"image": "p.png", "conversations": turns[:-1]})
    assert open_end.answer is None
    assert open_end.earlier == earlier
    turns[1]["value"] = "what is it?"  # without a mark the picture stands before the first question
    assert read(folder, {"image": "p.png", "conversations": turns}) == wanted


def test_messages_of_chat_models(folder: Path) -> None:
    parts = [
        {"type": "text", "text": "is "},
        {"type": "image_url", "image_url": {"url": "p.png"}},
        {"type": "text", "text": " like "},
        {"type": "image", "image": "q.png"},
        {"type": "text", "text": "?"},
    ]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "no"}]
    wanted = Sample([folder / "p.png", folder / "q.png"], "is  like ?", "no", marks=(3, 9))
    assert read(folder, {"messages": messages}) == wanted
    for part in parts:
        part.pop("image", part.pop("image_url", None))
    assert read(folder, {"messages": messages, "images": ["p.png", "q.png"]}) == wanted


def test_videos(folder: Path) -> None:
    """In the order of their marks, or of the parts that name them."""
    (folder / "film").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "film/1.png")
    film, pair = Video(folder / "film", 2), Video([folder / "p.png", folder / "q.png"], 4, every_frame=True)
    both = {"frames": ["p.png", "q.png"], "fps": 4, "every_frame": True}
    assert read(folder, {"video": "film"}) == Sample(Video(folder / "film"), CAPTION_PROMPT)
    assert read(folder, {"video": ["p.png"], "question": "?"}).videos == (Video([folder / "p.png"]),)
    line = {"image": "p.png", "videos": [{"frames": "film", "fps": 2}, both]}
    wanted = Sample([film, folder / "p.png", pair], "is  in  or ?", marks=(3, 7, 11))
    assert read(folder, {**line, "question": "is <video> in <image> or <video>?"}) == wanted
    assert read(folder, {**line, "question": "is it?"}).media == (folder / "p.png", film, pair)
    parts = [
        {"type": "video", "video": "film", "fps": 2},
        {"type": "image", "image": "p.png"},
        {"type": "text", "text": "is it?"},
    ]
    messages = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "no"}]}
    assert read(folder, messages) == Sample([film, folder / "p.png"], "is it?", "no", marks=(0, 0))
    assert read(folder, {"question": "is <video> a tag?"}) == Sample(None, "is <video> a tag?")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"video": "film.gif"}, "the missing video 'film.gif'"),
        ({"video": "../outside.png"}, "lies outside its folder"),
        ({"video": "http://a/b.mp4"}, "Download the video"),
        ({"video": ["gone.png"]}, "the missing picture 'gone.png'"),
        ({"video": []}, "no frames"),
        ({"video": 3}, "A video is a number"),
        ({"video": {"fps": 2}}, "a table of other keys"),
        ({"video": {"frames": ["p.png"], "fps": "2"}}, "no rate of a video"),
        ({"video": {"frames": ["p.png"], "every_frame": 1}}, "neither true nor false"),
        ({"videos": "film"}, "'videos' is no list"),
        ({"video": ["p.png"], "videos": [["p.png"]]}, "both 'video' and 'videos'"),
        ({"video": ["p.png"], "question": "<video><video>"}, "2 <video> marks and 1 videos"),
        ({"video": ["p.png"], "question": "<image>"}, "1 <image> marks and 0 pictures"),
        ({"video": ["p.png"], "text": "Once."}, "'text' beside 'video'"),
    ],
)
def test_videos_that_are_refused(folder: Path, line: dict[str, Any], words: str) -> None:
    assert words in refusal(folder, {"question": "?", **line} if "text" not in line else line)


def test_answers(folder: Path) -> None:
    assert read(folder, {"question": "?", "answers": ["red", "crimson", "red"]}).references == ("red", "crimson")
    assert read(folder, {"question": "?", "answer": ["red", "crimson"]}).answer == "red"
    assert read(folder, {"question": "?", "answer": "ruby", "answers": ["red"]}).references == ("ruby", "red")
    assert read(folder, {"question": "?", "answer": 3}).answer == "3"
    assert read(folder, {"question": "?", "answer": None}).answer is None


def test_running_text_and_labels(folder: Path) -> None:
    sample = read(folder, {"text": "Once.", "topic": "tale", "metadata": {"a": [1]}})
    assert sample == Sample(None, "Once.", kind=TEXT, topic="tale")
    assert read(folder, {"question": "?", "kind": "open", "topic": 3}).topic == "3"


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("image_file", "image"),
        ("imgs", "images"),
        ("Question", "question"),
        ("anwser", "answer"),
        ("message", "messages"),
    ],
)
def test_unknown_keys_name_the_nearest(folder: Path, key: str, near: str) -> None:
    message = refusal(folder, {"question": "?", key: "x"})
    assert f"unknown key '{key}'" in message
    assert f"Did you mean '{near}'? Known: image, images" in message


def turn(role: object, text: object) -> dict[str, Any]:
    return {"conversations": [{"from": role, "value": text}]}


@pytest.mark.parametrize(
    ("entry", "problem", "remedy"),
    [
        ({"image": "data:image/png;base64," + "A" * 9000}, "…' is an address", "Save the picture as a file"),
        ({"image": "https://host/a.png"}, "is an address", "Download the picture"),
        ({"image": "file:///tmp/p.png"}, "is an address", "without 'file:'"),
        ({"image": "p\0.png"}, "is no path of a file", "Name the picture's file"),
        ({"image": "p" * 5000}, "…' is no path of a file|missing picture", "file"),
        ({"image": "../outside.png"}, "outside its folder", "beside the JSONL file"),
        ({"images": ["p.png", "/etc/hostname"]}, "outside its folder", "beside the JSONL file"),
        ({"image": "r.png"}, "missing picture 'r.png'", "remove the line"),
        ({"image": "."}, "missing picture", "Add the file"),
        ({"image": 3}, "A picture is a number", "Name the picture's file"),
        ({"image": {"path": "p.png"}}, "A picture is a table", "Name the picture's file"),
        ({"images": ["p.png", None]}, "A picture is null", "Name the picture's file"),
        ({"image": "p.png", "images": ["p.png"]}, "both 'image' and 'images'", "Keep one"),
        ({"image": "p.png", "question": "<image> <image>?"}, "2 <image> marks and 1 picture", "<image> mark for each"),
        ({"question": "<image>what?"}, "1 <image> marks and 0 pictures", "<image> mark for each"),
        ({"question": "?", "answer": True}, "An answer is true", '"yes" or "no"'),
        ({"question": "?", "answers": []}, "'answers' is an empty list", "at least one"),
        ({"question": "?", "answers": [{"answer": "yes"}]}, "'answer' is a table", "in quotes"),
        ({"question": ["a"]}, "'question' is a list", "in quotes"),
        ({"question": "half \ud83d"}, "not valid Unicode", "surrogate"),
        ({"question": "?", "answer": "half \udc00"}, "not valid Unicode", "surrogate"),
        ({"question": "a\0b"}, "NUL character", "Remove"),
        ({"question": "?", "kind": []}, "'kind' is a list", "in quotes"),
        ({"text": "a", "answer": "b"}, "'text' beside 'answer'", "stands alone"),
        ({"text": " "}, "text is empty", "Leave empty texts out"),
        ({"answer": "a"}, "asks nothing", "Each line is JSON"),
        ({"conversations": []}, "no list of turns", '"from": ..., "value"'),
        ({"messages": "hi"}, "no list of turns", '"role": ..., "content"'),
        ({"messages": [{"role": "user", "text": "hi"}]}, "not just 'role' and 'content'", "two keys"),
        ({"messages": [{"role": "user", "content": [{"type": "audio", "audio": "x"}]}]}, "neither text nor", "Write"),
        ({"messages": [{"role": "user", "content": ["hi"]}]}, "neither text nor", "Write"),
        (turn("bot", "hi"), "no speaker 'bot'", "human"),
        (turn(3, "hi"), "no speaker '3'", "human"),
        (turn("human", 3), "'value' is a number", "in quotes"),
        (turn("gpt", "hi"), "no question of the user", "End it with one"),
        ({**turn("human", "hi"), "question": "?"}, "both 'conversations' and 'question'", "Keep one"),
        ({"image": "p.png", **turn("gpt", "<image>")}, "not the user's", "user's turns"),
        (["a"], "is not a sample", "Each line is JSON"),
        ("{", "not valid JSON", "Each line is JSON"),
        ("[" * 500 + "]" * 500, "nested", "Each line is JSON"),
        ("[" * 100_000, "nested|not valid JSON", "Each line is JSON"),
        ('{"question": "?", "question": "!"}', "the key 'question' stands twice", "Each line is JSON"),
        ('{"question": "?", "answer": NaN}', "NaN is no number", "Each line is JSON"),
        ('{"question": "?", "answer": ' + "9" * 5000 + "}", "not valid JSON", "Each line is JSON"),
        ('{"question": "a\0"}', "not UTF-8 text", "Save the file as UTF-8"),
        ('{"question": "' + "a" * (1 << 20) + '"}', "more than 1048576 characters", "cut long texts"),
    ],
)  # fmt: skip
def test_what_is_refused(folder: Path, entry: object, problem: str, remedy: str) -> None:
    message = refusal(folder, entry)
    assert any(part in message for part in problem.split("|")), message
    assert remedy in message


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-16-le", "cp1251"])
def test_other_encodings_are_refused_by_line(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "lines.jsonl"
    text = "{'question': 'Это что?'}" if encoding == "cp1251" else '{"question": "où est-ce?"}'
    path.write_bytes(
        b'{"text": "fine"}\n'.decode().encode(encoding if "16" in encoding else "ascii") + text.encode(encoding)
    )
    with pytest.raises(CalibrationError, match=r"Line [12] of .* is not UTF-8 text\. Save the file as UTF-8"):
        read_jsonl(path)


def test_a_byte_order_mark_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + '{"question": "où?"}\r\n{"text": "a"}'.encode())
    assert [sample.question for sample in read_jsonl(path)] == ["où?", "a"]


def test_the_hash_knows_everything_that_a_model_sees(folder: Path) -> None:
    p, q = folder / "p.png", folder / "q.png"
    turn = (Turn("user", "a"),)
    samples = [
        Sample(p, "?"),
        Sample([p, q], "?"),
        Sample([q, p], "?"),
        Sample(p, "?", "a"),
        Sample(p, "?", answers=("a", "b")),
        Sample(p, "?", marks=(1,)),
        Sample(p, "?", earlier=turn),
        Sample(p, "?", earlier=(Turn("user", "a", (1,)),)),
    ]
    assert len({hash_samples([sample]) for sample in samples}) == len(samples)
