"""Ask about the last frames of a camera, as a robot does.

    python examples/09_camera.py [out/model/engines/cpu]

Without a folder, the unquantized demo is exported first. It knows pictures alone, so it guesses.
"""

import json
import shutil
import sys
import tempfile
from collections import deque
from pathlib import Path

from PIL import Image, ImageDraw

import qe_edge
from qe_edge.demo import model_path
from qe_edge.export.exporter import export_model
from qe_edge.models.loading import load_model

FPS, KEPT = 4.0, 8  # of the camera; frames that the robot remembers: two seconds


def frame(number: int) -> Image.Image:
    """What the camera sees: a red disc that moves to the right. Put your camera's picture here."""
    picture = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(picture).ellipse((4 * number, 20, 4 * number + 20, 40), fill="red")
    return picture


def main(folder: Path) -> None:
    """Look for three seconds, and ask in every second frame."""
    pipeline = qe_edge.Pipeline.from_dir(folder, max_context=512)
    seen: deque[Image.Image] = deque(maxlen=KEPT)
    for number in range(int(3 * FPS)):
        seen.append(frame(number))
        if number % 2:
            video = qe_edge.Video(list(seen), fps=FPS)
            answer = pipeline("what color is the shape?", video, max_new_tokens=8)
            print(f"{number / FPS:.2f} s, {len(seen)} frames, {answer.timings.prompt_tokens} tokens: {answer.text}")


def demo_with_videos(folder: Path) -> Path:
    """The demo with a chat template that has a place for videos, as those of Qwen-VL models do."""
    shutil.copytree(model_path(), folder)
    config, template = folder / "config.json", folder / "chat_template.jinja"
    config.write_text(json.dumps({**json.loads(config.read_text()), "video_token_id": 7}))
    place = "{% elif c['type']=='video' %}<|vision_start|><|video_pad|><|vision_end|>{% else %}{{c['text']}}"
    template.write_text(template.read_text().replace("{% else %}{{c['text']}}", place))
    return folder


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        onnx = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(temporary, "onnx")
        if len(sys.argv) == 1:
            export_model(load_model(str(demo_with_videos(Path(temporary, "model")))), onnx)
        main(onnx)
