"""What has to hold for a Qwen family that reads videos, against transformers' own processors and classes."""

from __future__ import annotations

import copy
from collections import Counter
from functools import cache
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

from qe_edge.models.family import Sample
from qe_edge.models.images import open_image
from qe_edge.models.loading import LoadedModel
from qe_edge.models.samples import Turn
from qe_edge.models.videos import Video, open_video
from qe_edge.runtime.pipeline import Pipeline
from tests.models.conversations import ODD, SQUARE, noise
from tests.models.families import TOKENS, Made, token_errors
from tests.models.real_processors import torch_alone, video_class


@cache
def film(count: int, width: int, height: int, fps: float) -> Video:
    """Frames of noise, always the same for a shape."""
    return Video([noise(width + 2 * number, height).crop((0, 0, width, height)) for number in range(count)], fps)


def video_cases(even: Video, uneven: Video, wide: Video) -> dict[str, list[Sample]]:
    """Samples of every kind with these videos; the second has an odd number of frames."""
    return {
        "one video": [Sample(even, "what moves in it?", "circle")],
        "odd number of frames": [Sample(uneven, "what moves in it?", "a shape")],
        "two videos": [Sample((even, uneven), "what differs?", "the shape", marks=(0, 5))],
        "video and picture": [Sample((SQUARE, even, ODD), "is it in the video?", "no", marks=(0, 3, 19))],
        "in several turns": [
            Sample(
                (uneven, SQUARE, wide),
                "and which shape is it?",
                "no",
                earlier=(
                    Turn("user", "is there a red shape?", (0,)),
                    Turn("assistant", "yes"),
                    Turn("user", "and now this, in one?", (4, 13)),
                    Turn("assistant", "no"),
                ),
            )
        ],
        "batch": [
            Sample(wide, "what is it?", "red"),
            Sample(None, "is it?", "no"),
            Sample((SQUARE, uneven), "what is the color of the shape in these?", "teal", marks=(0, 8)),
        ],
    }


EVEN, UNEVEN, WIDE = film(6, 84, 64, 2.0), film(5, 117, 90, 3.0), film(4, 150, 60, 1.5)
VIDEO_CASES = video_cases(EVEN, UNEVEN, WIDE)


class VideoChecks:
    """The checks; a subclass has the fixture `made` of `FamilyChecks`, and says what transformers calls its parts."""

    processor_class: Any
    video_processor: str
    processor_options: ClassVar[dict[str, Any]] = {}
    video_template: str | None = None  # where it is not the model's own
    mixes: bool = True  # whether its combined processor takes pictures and videos at once
    video_cases: ClassVar[dict[str, list[Sample]]] = VIDEO_CASES

    def nested(self, pictures: list[Image.Image]) -> Any:  # noqa: ANN401 - lists of lists
        """The pictures of a sample as transformers' combined processor takes them."""
        return pictures

    def real_model(self, made: Made) -> Any:  # noqa: ANN401 - transformers' own class
        """The quantized model in which nothing but transformers' own code runs."""
        model: Any = copy.deepcopy(made.loaded.model)
        for module in model.modules():
            for name in ("forward", "get_video_features"):
                module.__dict__.pop(name, None)
        return model

    def real_inputs(self, made: Made, sample: Sample) -> dict[str, torch.Tensor]:
        """What transformers' own combined processor makes of a sample."""
        tokenizer = AutoTokenizer.from_pretrained(made.checkpoint)
        content, opened = [], []
        for turn in sample.conversation:
            parts: list[dict[str, str]] = []
            for number, (start, end) in enumerate(zip((0, *turn.marks), (*turn.marks, len(turn.text)), strict=True)):
                if number:
                    parts.append({"type": "video" if isinstance(sample.media[len(opened)], Video) else "image"})
                    opened.append(sample.media[len(opened)])
                parts += [{"type": "text", "text": turn.text[start:end]}] if start < end else []
            content.append({"role": turn.role, "content": parts})
        template = self.video_template if sample.videos else None
        prompt = tokenizer.apply_chat_template(
            content, chat_template=template, add_generation_prompt=True, tokenize=False
        )
        frames = [open_video(video) for video in sample.videos]
        videos = [np.stack([np.asarray(one) for one in film.read(range(film.count))]) for film in frames]
        known = [
            {
                "total_num_frames": film.count,
                "fps": film.fps,
                "frames_indices": list(range(film.count)),
                "duration": film.count / (film.fps or 24),
            }
            for film in frames
        ]
        with torch_alone():
            real = video_class(self.video_processor).from_pretrained(made.checkpoint)
            image_processor = made.loaded.processor.image_processor
            processor = self.processor_class(
                image_processor=image_processor, tokenizer=tokenizer, video_processor=real, **self.processor_options
            )
            found = processor(
                text=[prompt],
                images=self.nested([open_image(picture) for picture in sample.pictures]) if sample.pictures else None,
                videos=videos or None,
                video_metadata=known or None,
                return_tensors="pt",
            )
        return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}

    @pytest.mark.parametrize("case", list(VIDEO_CASES))
    def test_videos_equal_transformers(self, made: Made, case: str) -> None:
        """Inputs to the last bit, logits to 1e-5, greedy tokens."""
        samples = self.video_cases[case]
        assert token_errors(made, samples).max() < 1e-5
        expected, model = [], self.real_model(made)
        for sample in samples:
            encoded = made.engine.encode([sample])
            ours = made.loaded.family.torch_inputs(encoded)
            inputs = self.real_inputs(made, sample) if self.mixes or not sample.pictures else ours
            for name, value in inputs.items():
                if name != "pixel_attention_mask":  # of a model whose tiles are never padded
                    assert torch.equal(_flat(ours[name]), _flat(value)), name
            assert set(ours) - set(inputs) <= {"position_ids"}
            with torch.no_grad():
                logits = model(**inputs).logits.float().numpy()
            for engine in (made.engine, made.built):
                assert np.abs(engine.logits(encoded) - logits).max() < 1e-5 * np.abs(logits).max()
            ids = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
            answer = ids[0, inputs["input_ids"].shape[1] :].tolist()
            end = made.loaded.processor.tokenizer.eos_token_id
            expected.append(answer[: answer.index(end)] if end in answer else answer)
        for engine in (made.engine, made.built):
            assert engine.generate_ids(engine.encode(samples), TOKENS) == expected

    def test_calibration_sees_pictures_and_videos_at_once(self, original: LoadedModel) -> None:
        """A batch with both reaches every block once: statistics are of all tokens, and blocks run one by one."""
        family, model = original.family, original.model
        batch = family.encode(original.processor, self.video_cases["batch"], answers=True)
        calls: Counter[str] = Counter()
        blocks = family.blocks(model)
        handles = [
            block.module.register_forward_hook(lambda *_, name=block.name: calls.update([name])) for block in blocks
        ]
        with torch.no_grad():
            family.run_blocks(model, batch, {})
        for handle in handles:
            handle.remove()
        assert set(calls.values()) == {1}
        assert set(calls) == {block.name for block in blocks}

    def test_a_pipeline_shows_videos(self, made: Made) -> None:
        """Whatever its cache holds of earlier prompts, and several prompts at once."""
        asked = [sample for samples in self.video_cases.values() for sample in samples]
        asked += [Sample(asked[0].videos, "what color is it?"), asked[4], Sample(asked[1].videos, "is it red?")]
        expected = [made.engine.generate_ids(made.engine.encode([sample]), TOKENS)[0] for sample in asked]
        pipeline = Pipeline(made.built)
        assert [list(pipeline(sample, max_new_tokens=TOKENS).token_ids) for sample in asked] == expected
        assert [list(answer.token_ids) for answer in pipeline(asked, max_new_tokens=TOKENS)] == expected


def _flat(values: torch.Tensor) -> torch.Tensor:
    """Tiles in one row, however many axes say to which video they belong."""
    return values.flatten(0, 1) if values.ndim == 5 else values
