"""Chat messages of users: what can be read becomes a sample, anything else is one sentence."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qe_edge.models.images import Picture
from qe_edge.models.messages import read_messages
from qe_edge.models.samples import Sample, Turn
from qe_edge.system.errors import InputError

PIXELS = np.zeros((4, 4, 3), np.uint8)
TEXT = {"type": "text", "text": "What is "}
PICTURE = {"type": "image", "image": "a.png"}


def user(*content: object) -> dict[str, Any]:
    return {"role": "user", "content": content[0] if isinstance(content[0], str) else list(content)}


def test_a_prompt() -> None:
    assert read_messages("What?") == Sample(None, "What?")
    assert read_messages("What?", ["a.png", "b.png"]) == Sample(["a.png", "b.png"], "What?")


def test_a_conversation_keeps_its_pictures_in_place() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        user(TEXT, PICTURE, {"type": "text", "text": "this?"}),
        {"role": "assistant", "content": [{"type": "text", "text": "A circle."}]},
        user(
            {"type": "image_url", "image_url": {"url": "b.png", "detail": "low"}}, {"type": "text", "text": "And this?"}
        ),
    ]
    found = read_messages(messages)
    assert found.pictures == (Path("a.png"), Path("b.png"))
    assert found.conversation == (
        Turn("system", "Be brief."),
        Turn("user", "What is this?", (8,)),
        Turn("assistant", "A circle."),
        Turn("user", "And this?", (0,)),
    )


def test_pictures_beside_the_messages() -> None:
    place = {"type": "image"}
    found = read_messages([user(TEXT, place), {"role": "assistant", "content": "?"}, user(place, TEXT)], [PIXELS, b"x"])
    assert [turn.marks for turn in found.conversation] == [(8,), (), (0,)]
    assert found.pictures[1] == b"x"
    first = read_messages([user("a"), {"role": "assistant", "content": "?"}, user("b")], ["a.png"])
    assert [turn.marks for turn in first.conversation] == [(0,), (), ()]


def test_words_that_mark_pictures_elsewhere_are_text() -> None:
    assert read_messages([user("<image>What?")]).question == "<image>What?"


def test_a_data_address() -> None:
    content = bytes(range(256))
    url = "data:image/png;base64," + base64.b64encode(content).decode()
    assert read_messages([user({"type": "image_url", "image_url": {"url": url}})]).pictures == (content,)


@pytest.mark.parametrize(
    ("messages", "images", "words"),
    [
        ([], (), "'messages' is no list of turns"),
        ({"role": "user"}, (), "no list of turns"),
        ([user("a"), {"role": "assistant", "content": "b"}], (), "The last message is of the assistant"),
        ([{"role": "robot", "content": "a"}], (), "no speaker 'robot'"),
        ([{"role": "user"}], (), "not just 'role' and 'content'"),
        ([user(3)], (), "neither text nor a picture"),
        ([{"role": "user", "content": None}], (), "'content' is null"),
        ([user({"type": "audio", "audio": "a.wav"})], (), "neither text nor a picture nor a video"),
        ([user({"type": "image", "image": "a.png", "fps": 2})], (), "neither text nor a picture"),
        ([user({"type": "video", "video": "a.gif", "fps": 0})], (), "no rate of a video"),
        ([user({"type": "video", "video": "http://a/b.mp4"})], (), "is an address"),
        ([user({"type": "video", "video": []})], (), "no frames"),
        ([user({"type": "video", "video": [7]})], (), "A frame of a video is a int"),
        ([user({"type": "video"}, TEXT)], (), "1 video parts and 0 videos"),
        ([user({"type": "video"}, PICTURE)], (), "2 image parts and 1 pictures"),
        ([user({"type": "text", "text": 3})], (), "'text' is a number"),
        ([user(PICTURE, TEXT)], (PIXELS,), "named in the messages and beside them"),
        ([user({"type": "image"}, TEXT)], (), "1 image parts and 0 pictures"),
        ([user({"type": "image"}, TEXT)], (PIXELS, PIXELS), "1 image parts and 2 pictures"),
        ([{"role": "system", "content": [PICTURE]}, user("a")], (), "not the user's"),
        ([user({"type": "image", "image": "http://a/b.png"})], (), "is an address"),
        ([user({"type": "image", "image": "file:///b.png"})], (), "is an address"),
        ([user({"type": "image", "image": "data:image/png,abc"})], (), "not in base64"),
        ([user({"type": "image", "image": "data:image/png;base64,a!c="})], (), "base64 is damaged"),
        ([user({"type": "image", "image": 7})], (), "A picture is a int"),
        ([user("a\ud800")], (), "not valid Unicode"),
        ("a\0b", (), "NUL"),
    ],
)
def test_what_is_refused(messages: str, images: list[Picture], words: str) -> None:
    with pytest.raises(InputError) as caught:
        read_messages(messages, images)
    assert words in caught.value.problem
    assert caught.value.remedy
