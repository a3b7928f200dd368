"""Examples on the page show everything that was asked."""

from __future__ import annotations

import base64
import io

from PIL import Image

from qe_edge.models.samples import Sample, Turn
from qe_edge.validate.examples import choose_examples


def test_an_example_of_several_pictures_and_turns() -> None:
    pictures = [Image.new("RGB", (20, 10), "red"), Image.new("RGB", (5, 40), "blue")]
    earlier = (Turn("user", "what is it?"), Turn("assistant", "a square"))
    sample = Sample(pictures, "sure?", answers=("yes", "yep"), earlier=earlier)
    (example,) = choose_examples([sample], {"original": ["Yep."], "quantized": ["no"]})
    assert example.question == "user: what is it?\nassistant: a square\nsure?"
    assert example.reference == "yes / yep"
    assert [answer.correct for answer in example.answers] == [True, False]
    assert example.picture
    shown = Image.open(io.BytesIO(base64.b64decode(example.picture)))
    assert shown.size == (25, 40)
    assert [shown.getpixel(at) for at in ((19, 9), (20, 39), (0, 39))] == [(255, 0, 0), (0, 0, 255), (255, 255, 255)]
