"""Time per token at a short and a long context, and the memory of a long prompt, of an exported language model.

    python benchmarks/decode_context.py                   # layers of Qwen2-VL-2B's shapes and its head, random weights
    python benchmarks/decode_context.py --model FOLDER    # any language model, such as SmolLM2 of assemble_real_models

The model is quantized by RTN in W4A16 and run by ONNX Runtime. Every measurement is a process of its own: a prompt of
random tokens, then greedy tokens. Times are CPU time of one thread, which other programs on the machine change little.
To compare with an earlier version, run this file with that version's checkout on PYTHONPATH.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

SHAPES = {"hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12, "num_key_value_heads": 2}
VOCABULARY, POSITIONS = 151936, 8192
CONTEXTS = (64, 1024)
NEW, WARM_UP = 40, 8  # tokens after the prompt; the first ones do not count
POLL = 0.005  # seconds between two looks at a process's memory


def main() -> None:
    """Print a table and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a language model; random weights without")
    parser.add_argument("--layers", type=int, default=4, help="layers of the random model (default 4)")
    parser.add_argument("--head", default="none", help="grid of the head: none or int4")
    parser.add_argument("--accuracy-level", type=int, default=4, choices=(0, 4))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        in_process(export, arguments.model, arguments.layers, arguments.head, folder)
        found: dict[str, Any] = {"head": arguments.head, "accuracy_level": arguments.accuracy_level}
        for context in CONTEXTS:
            request = (folder / "onnx", context, arguments.accuracy_level)
            idle, _ = in_process(measure, *request, False)
            peak, times = in_process(measure, *request, True)
            found[str(context)] = {**times, "prompt_mebibytes": (peak - idle) / 2**20}
            found["loaded_mebibytes"] = idle / 2**20
    print(f"{'context':>8} {'prompt':>10} {'memory of the prompt':>22} {'per token':>11}")
    for context in CONTEXTS:
        row = found[str(context)]
        print(f"{context:8} {row['prompt_ms']:7.0f} ms {row['prompt_mebibytes']:18.0f} MiB {row['token_ms']:8.2f} ms")
    print(json.dumps(found))


def export(model: str | None, layers: int, head: str, folder: Path) -> None:
    """Quantize and write the graph."""
    from qe_edge.export.exporter import export_model
    from qe_edge.models.family import TEXT, Sample
    from qe_edge.models.quantized import save_quantized
    from qe_edge.quantization.quantizer import quantize
    from qe_edge.recipes.recipe import make_recipe

    if model is None:
        model = str(folder / "model")
        write_random_model(Path(model), layers)
    further = {} if head == "none" else {"head": head}  # which earlier versions do not know
    recipe = make_recipe(method="rtn", scheme="w4a16", modules=("language",), **further)
    samples = [Sample(None, "Rounding to nearest looks at no tokens.", kind=TEXT)]
    save_quantized(*quantize(model, recipe, samples), folder / "checkpoint")
    export_model(folder / "checkpoint", folder / "onnx")


def write_random_model(folder: Path, layers: int) -> None:
    """A language model of Qwen2-VL-2B's shapes with the demo's tokenizer."""
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    from qe_edge.demo import model_path

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    config = Qwen2Config(
        **SHAPES,
        vocab_size=VOCABULARY,
        num_hidden_layers=layers,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def measure(folder: Path, context: int, accuracy_level: int, run: bool) -> tuple[int, dict[str, float]]:
    """Peak bytes of this process, of the prompt alone, and milliseconds; without `run` the engine is only opened."""
    import threading

    from qe_edge.models import Encoded
    from qe_edge.runtime.engine import VisionLanguageEngine

    engine = VisionLanguageEngine.load(folder, threads=1, accuracy_level=accuracy_level)
    process, peak, watching = psutil.Process(), 0, True
    if not run:
        return process.memory_info().rss, {}
    ids = np.random.default_rng(0).integers(10, 400, (1, context))
    encoded = Encoded(ids, np.ones_like(ids), ids < 0, ids < 0)

    def watch() -> None:
        nonlocal peak
        while watching:
            peak = max(peak, process.memory_info().rss)
            time.sleep(POLL)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.process_time()
    logits, state = engine.prefill(encoded, None)
    prompt = time.process_time() - start
    watching = False
    watcher.join()
    times = []
    for _ in range(NEW):
        token = logits[:, -1].argmax(-1)
        start = time.process_time()
        logits = engine.decode(state, token)
        times.append(time.process_time() - start)
    return peak, {"prompt_ms": 1e3 * prompt, "token_ms": 1e3 * statistics.median(times[WARM_UP:])}


def in_process(function: Any, *arguments: Any) -> Any:  # noqa: ANN401 - any function's
    """The result of a function in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


if __name__ == "__main__":
    main()
