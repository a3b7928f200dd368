"""An answer, or actions, of a quantized checkpoint itself, in PyTorch."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch

from qe_edge.models.family import Sample
from qe_edge.models.quantized import load_quantized
from qe_edge.runtime.actions import check_steps, noise_of
from qe_edge.validate.actions import TorchActor
from qe_edge.validate.subjects import TorchSubject, in_float32


def answer(folder: Path, sample: Sample, max_tokens: int, threads: int | None) -> tuple[str, float]:
    """The answer, computed in float32, and the seconds that it took once the model was loaded."""
    if threads is not None:
        torch.set_num_threads(threads)
    loaded = in_float32(load_quantized(folder))
    started = time.perf_counter()
    encoded = loaded.family.encode(loaded.processor, [sample])
    (ids,) = TorchSubject(loaded, name="the quantized model").generate_ids(encoded, max_tokens)
    text: str = loaded.processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
    return text, time.perf_counter() - started


def act(
    folder: Path, sample: Sample, seed: int, steps: int | None, threads: int | None
) -> tuple[np.ndarray, float, int]:
    """Actions in the robot's own numbers, computed in float32, their seconds, and the number of steps."""
    if threads is not None:
        torch.set_num_threads(threads)
    loaded = in_float32(load_quantized(folder))
    config = loaded.family.config
    count = check_steps(steps, config.num_inference_steps)
    started = time.perf_counter()
    encoded = loaded.family.encode(loaded.processor, [sample])
    noise = noise_of((config.chunk_size, config.max_action_dim), [seed])
    (made,) = TorchActor(loaded, "the quantized model").actions(encoded, noise, count)
    return loaded.processor.actions.restored(made), time.perf_counter() - started, count
