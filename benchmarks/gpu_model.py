r"""Whether whole quantized models are right and fast in PyTorch on a GPU, where the layers run the plugin's kernels.

    python benchmarks/gpu_model.py --make CHECKPOINTS                                    # on any machine, two minutes
    python benchmarks/gpu_model.py CHECKPOINTS --library libqe_plugin.so --out gpu.json  # on the GPU
    python benchmarks/gpu_model.py --show gpu.json                                       # the tables of docs/results.md

The first line quantizes the demo in several schemes. The second needs torch, transformers and no network. Its parts run
in processes of their own, so that a fault of one leaves the others alone, and none begins or goes on when the time is
over. `--device cpu` runs the same with the operator's reference, to try the script itself.

The parts, in this order:

- `right`: every checkpoint on the GPU beside the CPU's reference, `QELinear` in float32: divergence (KL, mean and
  largest, in nats) and agreement of the likeliest token, for questions with pictures and for texts of 1 to 300 tokens,
  so that decoding and prompt kernels all run; and greedy answers. `16 bits alone` is the same model on the GPU with
  `QELinear` in PyTorch, without our kernels: it says what 16-bit numbers outside the layers do.
- `speed`: `gpu_decoder.py`.
- `graph`: a decoded token on a static cache, step by step, as a CUDA graph, and after a prompt with a picture.
- `threads`: two models in two threads on two streams, to the bit as alone; and a thread that has called nothing before.
- `compile`: that step with torch.compile, as one graph.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gpu_decoder
import numpy as np
import torch
from child_parts import run_part
from gpu_bench import Bench, compare, inputs_on, logits_of, pictures, prompts
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import StaticCache

from qe_edge.demo import model_path
from qe_edge.layers.packed_linear import PackedQELinear
from qe_edge.models import quantized
from qe_edge.models.loading import LoadedModel
from qe_edge.runtime.torch_layers import load_quantized
from qe_edge.validate.subjects import in_float32

# by folder: scheme, options, and the precision that the model is stored in, which is the one it runs in
CHECKPOINTS: dict[str, tuple[str, dict[str, Any], str]] = {
    "w4a8": ("w4a8", {}, "bfloat16"),
    "w4a8-int4": ("w4a8", {"adapter_dtype": "int4"}, "float16"),
    "w4a16": ("w4a16", {}, "float16"),
    "w3a16": ("w3a16", {}, "float16"),
}
STEPS = 8  # tokens that are decoded step by step
CAPACITY = 384
TIMES = 12  # that a thread runs its prompt
NOISE = 3.0  # times the divergence of 16-bit numbers alone, within which a model counts as right
FLOOR = 1e-6  # nats


def right(bench: Bench) -> dict[str, Any]:
    """Logits and answers of every checkpoint beside the CPU's."""
    result: dict[str, Any] = {}
    print(f"{'':34}{'KL':>10}{'worst':>10}{'argmax':>8}   16 bits alone: KL, argmax")
    for name in CHECKPOINTS:
        reference, plain = (
            in_float32(quantized.load_quantized(bench.folder / name)),
            load_quantized(bench.folder / name),
        )
        plain.model.to(bench.device)
        started = time.perf_counter()
        found = bench.load(name)
        seconds = time.perf_counter() - started
        layers = sum(isinstance(module, PackedQELinear) for module in found.model.modules())
        rows = {}
        ours, others = prompts(found, bench.questions), prompts(plain, bench.questions)
        for prompt, inputs in prompts(reference, bench.questions).items():
            wanted = logits_of(reference, inputs)
            row = compare(wanted, logits_of(found, ours[prompt]))
            noise = compare(wanted, logits_of(plain, others[prompt]))
            row |= {"noise": noise["kl"], "noise_same": noise["same"]}
            row["right"] = float(row["kl"] <= NOISE * noise["kl"] + FLOOR)
            rows[prompt] = row
        answers = answers_agree(bench, reference, found)
        result[name] = {"layers": layers, "load_s": seconds, "answers": answers, "prompts": rows}
        print_right(name, found, result[name])
    return result


def print_right(name: str, found: LoadedModel, result: dict[str, Any]) -> None:
    """Pictures, and of the texts those of the kernels that decode and of those for prompts the worst."""
    rows = result["prompts"]
    texts = {prompt: row for prompt, row in rows.items() if "tokens" in prompt}
    short = {prompt: row for prompt, row in texts.items() if int(prompt.split()[0]) <= 64}
    long = {prompt: row for prompt, row in texts.items() if prompt not in short}
    shown = [prompt for prompt in rows if prompt not in texts]
    shown += [max(part, key=lambda prompt: part[prompt]["kl"]) for part in (short, long)]
    wrong = [prompt for prompt, row in rows.items() if not row["right"]]
    for prompt in shown:
        row = rows[prompt]
        print(
            f"{name + ', ' + prompt:34}{row['kl']:10.2e}{row['worst']:10.2e}{row['same']:8.1%}   "
            f"{row['noise']:.2e} {row['noise_same']:.1%}"
        )
    verdict = f"NOT RIGHT: {', '.join(wrong)}" if wrong else f"all {len(rows)} prompts right"
    answers = f"{result['answers']['same']} of {result['answers']['of']} answers equal"
    dtype = str(found.model.dtype).removeprefix("torch.")
    print(
        f"{name}: {verdict}; {answers}; {result['layers']} layers, {dtype}, loaded in {result['load_s']:.1f} s",
        flush=True,
    )


def answers_agree(bench: Bench, reference: LoadedModel, found: LoadedModel) -> dict[str, int]:
    """How many greedy answers are the same, in a batch and one by one."""
    same = of = 0
    for part in (bench.questions, 1):
        encoded = pictures(reference, part)
        texts = []
        for loaded in (reference, found):
            ids = loaded.model.generate(**inputs_on(loaded, encoded), max_new_tokens=STEPS, do_sample=False)
            texts.append(ids[:, encoded.input_ids.shape[1] :].cpu().tolist())
        of += len(texts[0])
        same += sum(one == other for one, other in zip(*texts, strict=True))
    return {"same": same, "of": of}


class PictureStep:
    """A decoded token of the demo after a prompt with a picture."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded = loaded
        self.encoded = pictures(loaded, 1)
        self.place = self.encoded.input_ids.shape[1]
        family = loaded.family
        self.position = int(np.asarray(family.next_position_ids(family.position_ids(self.encoded), 0)).max())
        model: Any = loaded.model
        self.text, self.head = model.model.language_model, model.lm_head
        self.cache = StaticCache(config=model.config.get_text_config(), max_cache_len=CAPACITY)
        output = model(**inputs_on(loaded, self.encoded), past_key_values=self.cache, use_cache=True)
        self.first = int(output.logits[0, -1].argmax())
        self.step = gpu_decoder.StaticStep(self.text, self.head, self.text.embed_tokens, self.cache, CAPACITY)

    def run(self, advance: Callable[[], Tensor]) -> tuple[list[int], Tensor]:
        """Greedy tokens behind the prompt, and the logits `[steps, vocabulary]` of each."""
        self.step.at(self.first, self.place, self.position)
        tokens, logits = [self.first], []
        for _ in range(STEPS):
            logits.append(advance().detach().float().cpu().flatten())
            tokens.append(int(self.step.ids))
        return tokens, torch.stack(logits)

    def from_the_start(self, tokens: Sequence[int]) -> Tensor:
        """The same logits from the whole sequence at once, without a cache."""
        inputs = inputs_on(self.loaded, self.encoded)
        further = torch.tensor([list(tokens[:-1])], device=inputs["input_ids"].device)
        for name, filling in (("input_ids", further), ("attention_mask", torch.ones_like(further))):
            inputs[name] = torch.cat((inputs[name], filling), 1)
        if "mm_token_type_ids" in inputs:
            inputs["mm_token_type_ids"] = torch.cat((inputs["mm_token_type_ids"], torch.zeros_like(further)), 1)
        logits: Tensor = self.loaded.model(**inputs, use_cache=False).logits
        return logits[0, self.place :].float().cpu()


def graph(bench: Bench) -> dict[str, Any]:
    """A decoded token as a CUDA graph."""
    result = {}
    for name in list(CHECKPOINTS)[:2]:
        one = PictureStep(bench.load(name))
        tokens, logits = one.run(one.step.advance)
        row = compare(one.from_the_start(tokens), logits)
        text = f"{name}: step by step beside the whole sequence: KL {row['kl']:.2e}, argmax {row['same']:.1%}"
        if bench.on_gpu:
            one.step.at(one.first, one.place, one.position)
            replayed, output = gpu_decoder.capture(one.step.advance)
            again, graphed = one.run(lambda replayed=replayed, output=output: (replayed.replay(), output)[1])
            row |= {"tokens": float(again == tokens), "bits": float(torch.equal(graphed, logits))}
            text += f"; CUDA graph: {'the same' if again == tokens else 'OTHER'} tokens, logits "
            text += "to the bit" if row["bits"] else f"KL {compare(logits, graphed)['kl']:.2e}"
        print(text, flush=True)
        result[name] = row
    return result


def compiled(bench: Bench) -> dict[str, Any]:
    """The same step with torch.compile."""
    one = PictureStep(bench.load("w4a8-int4"))
    tokens, logits = one.run(one.step.advance)
    step = torch.compile(one.step.logits, fullgraph=True, dynamic=False)

    def advance() -> Tensor:
        found = step()
        one.step.ids.copy_(found.argmax(-1))
        one.step.place.add_(1), one.step.positions.add_(1)
        return found

    started = time.perf_counter()
    again, found = one.run(advance)
    seconds = time.perf_counter() - started
    row: dict[str, Any] = {**compare(logits, found), "tokens": again == tokens, "seconds": seconds}
    print(
        f"torch.compile, fullgraph: KL {row['kl']:.2e} to eager, {'the same' if row['tokens'] else 'OTHER'} tokens, "
        f"{seconds:.1f} s",
        flush=True,
    )
    return row


def threads(bench: Bench) -> dict[str, Any]:
    """Two models in two threads."""
    names = list(CHECKPOINTS)[1:3]
    models = [bench.load(name) for name in names]
    inputs = [inputs_on(model, pictures(model, min(4, bench.questions))) for model in models]
    alone = [logits_of(model, each) for model, each in zip(models, inputs, strict=True)]
    bench.synchronize()
    same, errors = [0, 0], []

    def work(index: int) -> None:
        try:
            with torch.inference_mode(), bench.stream():
                for _ in range(TIMES if bench.on_gpu else 1):
                    same[index] += torch.equal(logits_of(models[index], inputs[index]), alone[index])
        except Exception as error:  # noqa: BLE001 - shown below
            errors.append(f"{type(error).__name__}: {error}")

    run_threads([lambda index=index: work(index) for index in range(2)])
    times = TIMES if bench.on_gpu else 1
    fresh = fresh_thread(bench, models[0])
    print(
        f"Two threads: {same[0]} and {same[1]} of {times} times to the bit as alone; a new thread: {fresh}", *errors[:1]
    )
    return {"same": same, "of": times, "fresh": fresh, "errors": errors}


def fresh_thread(bench: Bench, model: LoadedModel) -> str:
    """The first call of a new thread is a layer."""
    layer = next(module for module in model.model.modules() if isinstance(module, PackedQELinear))
    x = torch.randn((1, layer.in_features), device=bench.device).to(layer.dtype)
    wanted, found = layer(x), []
    bench.synchronize()

    def call() -> None:
        try:
            with torch.inference_mode():
                y = layer(x)
            bench.synchronize()
            found.append("right" if torch.equal(y, wanted) else "WRONG")
        except Exception as error:  # noqa: BLE001 - shown by the caller
            found.append(f"FAILED: {type(error).__name__}: {error}")

    run_threads([call])
    return found[0]


def run_threads(bodies: Sequence[Callable[[], None]]) -> None:
    """Run bodies side by side."""
    started = [threading.Thread(target=body) for body in bodies]
    for one in started:
        one.start()
    for one in started:
        one.join()


def speed(bench: Bench) -> dict[str, Any]:
    """`gpu_decoder.py`."""
    return gpu_decoder.speed(bench.device, str(bench.library))


PARTS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "right": right, "speed": speed, "graph": graph, "threads": threads, "compile": compiled,
}  # fmt: skip


def make(folder: Path) -> None:
    """Quantize the demo to every checkpoint."""
    from qe_edge.quantization.quantizer import quantize
    from qe_edge.recipes.recipe import make_recipe

    with tempfile.TemporaryDirectory() as scratch:
        for name, (scheme, options, dtype) in CHECKPOINTS.items():
            source = Path(scratch) / dtype
            if not source.exists():
                shutil.copytree(model_path(), source)
                config = json.loads((source / "config.json").read_text(encoding="utf-8"))
                (source / "config.json").write_text(json.dumps({**config, "dtype": dtype}), encoding="utf-8")
                tensors = load_file(source / "model.safetensors")
                kept = {key: tensor.to(getattr(torch, dtype)) for key, tensor in tensors.items()}
                save_file(kept, source / "model.safetensors", metadata={"format": "pt"})
            recipe = make_recipe(
                scheme=scheme,
                modules=("language", "visual", "merger"),
                options={"tokens": 1024, **options},
                calibration={"samples": 16},
            )
            quantized.save_quantized(*quantize(str(source), recipe), folder / name)
            print(f"Wrote {folder / name}", flush=True)


def markdown(results: dict[str, Any]) -> list[str]:
    """The tables of docs/results.md."""
    lines = [
        "| the demo | divergence | 16 bits alone | likeliest token | answers |",
        "| --- | ---: | ---: | ---: | --- |",
    ]
    for name, row in results["right"].items():
        if name not in CHECKPOINTS:
            continue
        rows = list(row["prompts"].values())
        numbers = [sum(one[key] for one in rows) / len(rows) for key in ("kl", "noise", "same")]
        answers = f"{row['answers']['same']} of {row['answers']['of']}"
        lines.append(f"| {name} | {numbers[0]:.1e} | {numbers[1]:.1e} | {100 * numbers[2]:.1f} % | {answers} |")
    columns = {"eager_ms": "decode", "graph_ms": "decode, CUDA graph", "prompt_ms": "prompt"}
    lines += ["", "| milliseconds | " + " | ".join(columns.values()) + " | GPU memory, MiB |"]
    lines += ["| --- | ---: | ---: | ---: | ---: |"]
    rows = results["speed"]["rows"]
    for kind, row in rows.items():
        cells = [f"{row[name]:.2f} ({rows['FP16'][name] / row[name]:.2f}x)" for name in columns]
        lines.append(f"| {kind} | " + " | ".join(cells) + f" | {row['peak_mib']:.0f} |")
    return lines


def machine(device: str) -> dict[str, str]:
    """Versions, and the GPU as its driver names it."""
    import transformers

    found = {"python": sys.version.split()[0], "torch": torch.__version__, "transformers": transformers.__version__}
    return {**found, "device": device, "cpus": str(os.cpu_count())}


def main() -> int:
    """Print the parts' tables, and write JSON; returns 1 where a part failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", type=Path, nargs="?", help="folder of the checkpoints that --make wrote")
    parser.add_argument("--make", type=Path, help="write the checkpoints to this folder, and do nothing else")
    parser.add_argument("--show", type=Path, help="print the tables of such a file, and do nothing else")
    parser.add_argument("--library", type=Path, default=Path("libqe_plugin.so"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--questions", type=int, default=8, help="pictures of a batch (8)")
    parser.add_argument("--seconds", type=float, default=100.0, help="how long all of it may take (100)")
    parser.add_argument("--out", type=Path, help="file for the results as JSON")
    options = parser.parse_args()
    if options.make:
        make(options.make)
        return 0
    if options.show:
        print("\n".join(markdown(json.loads(options.show.read_text(encoding="utf-8")))))
        return 0
    if options.checkpoints is None:
        parser.error("Name the folder of the checkpoints, or write it with --make.")
    end = time.perf_counter() + options.seconds
    bench = Bench(options.checkpoints, options.device, options.library.resolve(), options.questions)
    results: dict[str, Any] = {"script": "gpu_model", "machine": machine(options.device)}
    print(" ".join(f"{name} {value}" for name, value in results["machine"].items()), flush=True)
    for part in options.parts:
        left = end - time.perf_counter()
        results[part] = run_part(part, partial(PARTS[part], bench), left) if left > 1 else {"failed": ["out of time"]}
        if options.out:
            options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    failed = [part for part in options.parts if "failed" in results[part]]
    print(f"FAILED: {', '.join(failed)}" if failed else "All parts ran.")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
