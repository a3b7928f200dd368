r"""One of our models on one task of lmms-eval; `paper_tables.py` runs this in an environment that has lmms-eval.

    PYTHON benchmarks/lmms_adapter.py MODEL TASK RESULT.json [--include FOLDER] [--limit N] [--device cuda]

MODEL is a quantized checkpoint, or an original model; it computes in float32. Answers are greedy, whatever a task's
settings say. Our model families read one picture a question: several (MMMU, MuirBench) are joined side by side, for
the original and the quantized model alike.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.model import lmms
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager
from PIL import Image
from tqdm import tqdm

from qe_edge.budget.accounting import count_bits
from qe_edge.checkpoint.detection import is_checkpoint
from qe_edge.layers.linear import quantized_linears
from qe_edge.models.family import Encoded, Sample
from qe_edge.models.images import open_image
from qe_edge.models.loading import LoadedModel, load_model
from qe_edge.models.quantized import load_quantized
from qe_edge.system.errors import InputError, QEError
from qe_edge.validate.subjects import block_groups, in_float32

LONGEST = 128  # tokens of an answer where the task does not say


class QEEdge(lmms):  # type: ignore[misc] # lmms-eval has no types
    """A model of ours behind lmms-eval's interface.

    Args:
        loaded: The model in float32.
        device: Where it computes.
    """

    is_simple = True

    def __init__(self, loaded: LoadedModel, device: str) -> None:
        super().__init__()
        self.loaded = loaded
        self.device = torch.device(device)
        loaded.model.to(self.device)  # type: ignore[arg-type] # transformers wraps this method

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Greedy answers."""
        return [self._answer(*request.args) for request in tqdm(requests, desc="answers")]

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """None of the paper's tasks asks twice."""
        raise InputError(f"{len(requests)} questions have several rounds.", "Choose a task that asks once.")

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """All of the paper's tasks can be asked as questions; how lmms-eval ranks losses differs between versions."""
        raise InputError(f"{len(requests)} continuations are to be rated, not generated.", "Choose a generative task.")

    def _answer(
        self,
        context: str,
        settings: dict[str, Any],
        pictures_of: Callable[[Any], Any],
        number: int,
        task: str,
        split: str,
    ) -> str:
        pictures = pictures_of(self.task_dict[task][split][number]) or []
        sample = Sample(join_pictures(pictures) if pictures else None, context)
        encoded = self.loaded.family.encode(self.loaded.processor, [sample])
        generate: Any = self.loaded.model.generate
        with torch.no_grad():
            tokens = generate(
                **self._inputs(encoded),
                max_new_tokens=int(settings.get("max_new_tokens", LONGEST)),
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
            )
        answer = self.loaded.processor.tokenizer.decode(
            tokens[0, encoded.input_ids.shape[1] :].tolist(), skip_special_tokens=True
        )
        ends = settings.get("until") or []
        for end in [ends] if isinstance(ends, str) else ends:
            answer = answer.split(end)[0] if end else answer
        return str(answer).strip()

    def _inputs(self, encoded: Encoded) -> dict[str, torch.Tensor]:
        return {name: tensor.to(self.device) for name, tensor in self.loaded.family.torch_inputs(encoded).items()}


def join_pictures(pictures: Sequence[Image.Image]) -> Image.Image:
    """Several pictures side by side, in their order; one stays as it is."""
    opened = [open_image(picture) for picture in pictures]
    if len(opened) == 1:
        return opened[0]
    lefts = list(accumulate((picture.width for picture in opened), initial=0))
    joined = Image.new("RGB", (lefts.pop(), max(picture.height for picture in opened)), "white")
    for left, picture in zip(lefts, opened, strict=True):
        joined.paste(picture, (left, 0))
    return joined


def bits_of(loaded: LoadedModel) -> tuple[float, float]:
    """Bits per weight, stored and read, of the quantized layers; of an original, those of its precision."""
    if quantized_linears(loaded.model):
        bits = count_bits(loaded.model, block_groups(loaded)).total
        return bits.stored_bits, bits.read_bits
    width = 8 * next(loaded.family.blocks(loaded.model)[-1].module.parameters()).itemsize
    return width, width


def evaluate(reference: str, task: str, include: Path | None, limit: int | None, device: str) -> dict[str, Any]:
    """What lmms-eval says of a model on a task: its numbers, how many questions, and the model's bits per weight."""
    folder = Path(reference)
    loaded = load_quantized(folder) if is_checkpoint(folder) else load_model(reference)
    stored, read = bits_of(loaded)
    manager = TaskManager("ERROR", include_path=None if include is None else str(include))
    found = simple_evaluate(
        QEEdge(in_float32(loaded), device),
        tasks=[task],
        task_manager=manager,
        limit=limit,
        log_samples=False,
        bootstrap_iters=0,
        batch_size=1,
        device=device,
    )
    return {
        "model": reference,
        "task": task,
        "limit": limit,
        "stored_bits": stored,
        "read_bits": read,
        "samples": found.get("n-samples", {}),
        "results": {**found["results"], **found.get("groups", {})},
    }


def main() -> int:
    """Evaluate, and write the result when it is complete."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("task")
    parser.add_argument("result", type=Path)
    parser.add_argument("--include", type=Path, help="folder with further tasks")
    parser.add_argument("--limit", type=int, help="questions of every task")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    try:
        found = evaluate(options.model, options.task, options.include, options.limit, options.device)
    except QEError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    part = options.result.with_name(f"{options.result.name}.part")
    part.write_text(json.dumps(found, indent=2, default=str) + "\n", encoding="utf-8")
    part.replace(options.result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
