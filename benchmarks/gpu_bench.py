"""Checkpoints of the demo on a GPU, what is asked of them, and how two models are compared: for `gpu_model.py`."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import gpu_decoder
import torch
from torch import Tensor

from qe_edge.calibration.sources import load_evaluation
from qe_edge.layers.packed_linear import pack_layers
from qe_edge.models.family import Encoded
from qe_edge.models.loading import LoadedModel
from qe_edge.runtime.torch_layers import load_quantized

TOKENS = (1, 2, 5, 9, 16, 17, 40, 64, 65, 150, 300)


class Bench:
    """Where and with what it runs."""

    def __init__(self, folder: Path, device: str, library: Path, questions: int) -> None:
        self.folder, self.device, self.library = folder, device, library
        self.on_gpu = device.startswith("cuda")
        self.questions = questions

    def load(self, name: str) -> LoadedModel:
        """A checkpoint with the kernels."""
        if self.on_gpu:
            return load_quantized(self.folder / name, self.device, plugin_library=self.library)
        loaded = load_quantized(self.folder / name)
        pack_layers(loaded.model, loaded.model.dtype, str(self.library))
        return loaded

    def stream(self) -> Any:  # noqa: ANN401 - a context
        """A stream of one's own that waits for nothing."""
        return torch.cuda.stream(torch.cuda.Stream()) if self.on_gpu else nullcontext()

    def synchronize(self) -> None:
        """Wait for the GPU."""
        gpu_decoder.synchronize(self.device)


def pictures(loaded: LoadedModel, count: int) -> Encoded:
    """A batch of questions with pictures."""
    return loaded.family.encode(loaded.processor, load_evaluation("demo")[:count])


def inputs_on(loaded: LoadedModel, encoded: Encoded) -> dict[str, Tensor]:
    """Inputs of a model where the model is, pictures in its precision."""
    found = {}
    for name, tensor in loaded.family.torch_inputs(encoded).items():
        dtype = loaded.model.dtype if tensor.is_floating_point() else tensor.dtype
        found[name] = tensor.to(device=loaded.model.device, dtype=dtype)
    return found


def prompts(loaded: LoadedModel, count: int) -> dict[str, dict[str, Tensor]]:
    """Inputs by a name: questions with pictures, and texts of `TOKENS` tokens."""
    encoded = pictures(loaded, count)
    found = {f"{count} pictures": inputs_on(loaded, encoded), "1 picture": inputs_on(loaded, pictures(loaded, 1))}
    text = loaded.processor.tokenizer(" ".join(sample.question for sample in load_evaluation("demo")[:60]))["input_ids"]
    for tokens in TOKENS:
        ids = torch.tensor([text[:tokens]], device=loaded.model.device)
        found[f"{tokens} tokens"] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return found


def logits_of(loaded: LoadedModel, inputs: dict[str, Tensor]) -> Tensor:
    """Logits float32 `[tokens, vocabulary]` of all tokens that are no padding, on the CPU."""
    logits: Tensor = loaded.model(**inputs, use_cache=False).logits
    return logits[inputs["attention_mask"].bool()].float().cpu()


def compare(wanted: Tensor, found: Tensor) -> dict[str, float]:
    """Divergence in nats and agreement of the likeliest token."""
    one, other = wanted.double().log_softmax(-1), found.double().log_softmax(-1)
    divergence = (one.exp() * (one - other)).sum(-1)
    same = (wanted.argmax(-1) == found.argmax(-1)).double().mean()
    return {"kl": float(divergence.mean()), "worst": float(divergence.max()), "same": float(same)}
