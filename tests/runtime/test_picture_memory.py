"""Pictures that were seen are not prepared again, within a number of bytes, and never taken for another."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from qe_edge.runtime.picture_memory import PictureMemory, joint_key

PIXELS = 10_000  # float32 numbers of a prepared picture
IMAGES = 200  # that it is cut into, as a long video is


class Processor:
    """Makes an array of a picture, and counts."""

    size = 7

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, *, images: list[Any], scale: float = 1.0) -> dict[str, np.ndarray]:
        self.calls += 1
        value = float(np.asarray(images[0] if isinstance(images[0], Image.Image) else images[0][0]).mean()) * scale
        return {"pixel_values": np.full(PIXELS, value, np.float32), "grid": np.array([[1, 2, 3]] * IMAGES)}


def picture(value: int, width: int = 2) -> Image.Image:
    return Image.new("RGB", (width, 4 // width), (value,) * 3)


def test_a_picture_is_prepared_once() -> None:
    memory = PictureMemory(processor := Processor(), 1 << 20)
    first = memory(images=[picture(3)])
    assert memory(images=[picture(3)])["pixel_values"] is first["pixel_values"]
    assert processor.calls == 1
    assert memory.used[0] == memory.used[1]
    assert memory.size == 7  # the processor's own
    others: tuple[dict[str, Any], ...] = (
        {"images": [picture(4)]},
        {"images": [[picture(3)]]},
        {"images": [[picture(3), picture(3)]]},
        {"images": [picture(3, width=4)]},
        {"images": [picture(3)], "scale": 2.0},
    )
    for other in others:
        memory(**other)
    assert processor.calls == 6
    assert len(set(memory.used)) == 6


def test_features_take_the_place_of_pixels() -> None:
    memory = PictureMemory(Processor(), 1 << 20)
    memory(images=[picture(3)])
    (key,) = memory.used
    assert memory.features(key) is None
    assert memory.nbytes > 4 * PIXELS
    features = np.ones((5, 8), np.float32)
    memory.remember(key, features, instead_of_pixels=True)
    assert memory.features(key) is features
    assert memory.nbytes < 1000 + 24 * IMAGES
    again = memory(images=[picture(3)])
    assert again["pixel_values"].shape == (PIXELS,)  # all that a prompt asks of it
    assert again["grid"].tolist() == [[1, 2, 3]] * IMAGES


def test_pixels_that_are_needed_again_stay() -> None:
    memory = PictureMemory(Processor(), 1 << 20)
    memory(images=[picture(3)])
    memory(images=[picture(5)])
    together = joint_key(tuple(memory.used))
    memory.remember(together, np.ones((5, 8), np.float32), instead_of_pixels=False)
    assert memory.features(together) is not None
    assert memory(images=[picture(3)])["pixel_values"][0] == 3
    assert together != joint_key(tuple(reversed(memory.used[:2])))


def test_the_oldest_go_first() -> None:
    memory = PictureMemory(processor := Processor(), 3 * (4 * PIXELS + 24 * IMAGES))
    for value in (1, 2, 3, 1, 4):
        memory(images=[picture(value)])
        assert memory.nbytes <= 3 * (4 * PIXELS + 24 * IMAGES)
    assert processor.calls == 4
    memory(images=[picture(1)])  # was asked for since
    assert processor.calls == 4
    memory(images=[picture(2)])
    assert processor.calls == 5
    forgotten = memory.used[2]
    memory.remember(forgotten, np.ones((5, 8), np.float32), instead_of_pixels=True)
    assert memory.features(forgotten) is None
    tiny = PictureMemory(processor, 100)
    assert tiny(images=[picture(9)])["pixel_values"][0] == 9
    assert tiny.nbytes == 0
