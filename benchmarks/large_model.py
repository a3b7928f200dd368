"""Time and memory of quantizing, exporting and building models in real shapes, and what whole models would take.

    python benchmarks/large_model.py --sizes 2b 7b --layers 2 4
    python benchmarks/large_model.py --sizes 2b --layers 2 4 28 --work FOLDER

The models are Qwen2-VL in the shapes of 2B, 7B and 72B, with random bfloat16 weights and only some of the language
layers. Every stage is the command of a user, in a process of its own. Memory is the process's largest resident set,
with the pages of files that it maps. Straight lines through two numbers of layers give the whole model's time and
memory; where the whole model is run too, the table shows the ratio of the prediction to it. `planned` is what
`--dry-run` promises for the time and memory of quantizing; its time leaves out reading and writing files. A size that
was not run gets its time from a power law through the others' time per layer, and its memory from the plan: both are
predicted.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

COMMON = {"vocab_size": 152064, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6}
SIZES: dict[str, dict[str, Any]] = {
    "2b": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "7b": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
    "72b": {
        "hidden_size": 8192,
        "intermediate_size": 29568,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
}
VISION = {"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4}
STAGES = ("quantize", "export", "build")
GIB = 2**30
INDEX = "model.safetensors.index.json"
COMMAND = "import sys; from qe_edge.cli import main; sys.exit(main())"


@dataclass(frozen=True)
class Cost:
    """What a stage took.

    Attributes:
        seconds: Time.
        gib: Largest resident set.
    """

    seconds: float
    gib: float


def write_configuration(folder: Path, size: str, layers: int, vision_blocks: int) -> Any:  # noqa: ANN401 - transformers' own class
    """Write a model's configuration, with the demo's tokenizer and image processor."""
    import torch
    from transformers import AutoConfig

    from qe_edge.demo import model_path

    config = AutoConfig.from_pretrained(model_path())
    shape = {**COMMON, **SIZES[size], "num_hidden_layers": layers}
    for name, value in shape.items():
        setattr(config.text_config, name, value)
    config.text_config.layer_types = ["full_attention"] * layers
    head = shape["hidden_size"] // shape["num_attention_heads"]
    rope = dict(config.text_config.rope_parameters)
    sections = [head // 8, 3 * head // 16, 3 * head // 16]
    config.text_config.rope_parameters = {**rope, "mrope_section": sections}
    config.tie_word_embeddings = shape["tie_word_embeddings"]
    for name, value in {**VISION, "depth": vision_blocks, "hidden_size": shape["hidden_size"]}.items():
        setattr(config.vision_config, name, value)
    config.dtype = config.text_config.dtype = config.vision_config.dtype = torch.bfloat16
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    for file in model_path().iterdir():
        if file.name != "config.json" and file.suffix != ".safetensors":
            shutil.copy(file, folder)
    return config


def write_model(folder: Path, size: str, layers: int, vision_blocks: int) -> None:
    """Write a model with random weights, one tensor at a time."""
    import torch
    from accelerate import init_empty_weights
    from safetensors.torch import save_file
    from transformers import AutoModelForImageTextToText

    config = write_configuration(folder, size, layers, vision_blocks)
    with init_empty_weights():
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    random = torch.Generator().manual_seed(0)
    index: dict[str, str] = {}
    skipped = {"lm_head.weight"} if config.tie_word_embeddings else set()
    for number, (name, tensor) in enumerate(model.state_dict().items()):
        if name in skipped:
            continue
        file = f"model-{number:05}.safetensors"
        drawn = torch.randn(tensor.shape, generator=random, dtype=torch.float32).mul_(0.02).to(torch.bfloat16)
        if "norm" in name and name.endswith("weight"):
            drawn += 1
        save_file({name: drawn}, folder / file, metadata={"format": "pt"})
        index[name] = file
    listing = {"metadata": {}, "weight_map": index}
    (folder / INDEX).write_text(json.dumps(listing), encoding="utf-8")


def run(words: list[str]) -> Cost:
    """Run a command of ours and measure it.

    Raises:
        RuntimeError: If it fails.
    """
    begun = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", COMMAND, *words], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"qe-edge {' '.join(words)} failed.")
    return Cost(time.perf_counter() - begun, usage.ru_maxrss * 1024 / GIB)


def measure(size: str, layers: int, work: Path, arguments: argparse.Namespace) -> dict[str, Cost]:
    """Every stage of a model with some layers."""
    folder = work / f"{size}-{layers}"
    if not (folder / "model" / INDEX).is_file():
        write_model(folder / "model", size, layers, arguments.vision_blocks)
    chosen = ["--method", arguments.method, "--samples", str(arguments.samples)]
    chosen += ["--bits", str(arguments.bits)] if arguments.bits else []
    commands = {
        "quantize": ["quantize", str(folder / "model"), "-o", str(folder / "checkpoint"), "--overwrite", *chosen],
        "export": ["export", str(folder / "checkpoint"), "-o", str(folder / "onnx"), "--overwrite"],
        "build": ["build", str(folder / "onnx"), "-o", str(folder / "cpu"), "--target", "cpu", "--overwrite"],
    }
    found = {}
    for stage in arguments.stages:
        found[stage] = run(commands[stage])
        print(f"{size}, {layers} layers, {stage}: {found[stage].seconds:.0f} s, {found[stage].gib:.2f} GiB", flush=True)
    return found


def job_of(size: str, layers: int, work: Path, arguments: argparse.Namespace) -> Any:  # noqa: ANN401 - imported late
    """What `quantize` does with a model."""
    from qe_edge.quantization.job import make_job
    from qe_edge.recipes.recipe import make_recipe

    budget = {"budget": {"bits": arguments.bits}} if arguments.bits else {}
    recipe = make_recipe(method=arguments.method, calibration={"samples": arguments.samples}, **budget)
    return make_job(str(work / f"{size}-{layers}" / "model"), recipe)


def planned_gib(size: str, layers: int, work: Path, arguments: argparse.Namespace) -> float:
    """Memory that `--dry-run` promises; it reads no weights."""
    from qe_edge.quantization.plan import make_plan

    job = job_of(size, layers, work, arguments)
    return make_plan(job.model, job.recipe, job.samples).memory_bytes / GIB


def planned(size: str, layers: int, work: Path, arguments: argparse.Namespace) -> Cost:
    """Time and memory that `--dry-run` promises."""
    from qe_edge.quantization.timing import predicted_seconds

    seconds = predicted_seconds(job_of(size, layers, work, arguments))
    return Cost(seconds, planned_gib(size, layers, work, arguments))


def at(layers: int, costs: dict[int, Cost]) -> Cost:
    """The straight line through the two smallest numbers of layers."""
    low, high = sorted(costs)[:2]
    share = (layers - low) / (high - low)
    values = (
        before + share * (after - before)
        for before, after in zip(asdict(costs[low]).values(), asdict(costs[high]).values(), strict=True)
    )
    return Cost(*values)


def layer_seconds(costs: dict[int, Cost]) -> float:
    """Seconds that one more layer takes."""
    low, high = sorted(costs)[:2]
    return (costs[high].seconds - costs[low].seconds) / (high - low)


def weights_of(size: str) -> int:
    """Weights of the linear layers of one block."""
    shape = SIZES[size]
    hidden, heads, pairs = shape["hidden_size"], shape["num_attention_heads"], shape["num_key_value_heads"]
    return int(hidden * (2 * hidden + 2 * hidden * pairs // heads + 3 * shape["intermediate_size"]))


def predict_others(found: dict[str, dict[int, dict[str, Cost]]], work: Path, arguments: argparse.Namespace) -> None:
    """Print what sizes that were not run would take."""
    times = {size: layer_seconds({n: run["quantize"] for n, run in runs.items()}) for size, runs in found.items()}
    low, *_, high = sorted(times, key=weights_of)
    power = math.log(times[high] / times[low]) / math.log(weights_of(high) / weights_of(low))
    for size in (size for size in SIZES if size not in found):
        layers = SIZES[size]["num_hidden_layers"]
        write_configuration(work / f"{size}-{layers}" / "model", size, layers, arguments.vision_blocks)
        each = times[high] * (weights_of(size) / weights_of(high)) ** power
        memory = planned_gib(size, layers, work, arguments)
        hours = each * layers / 3600
        print(
            f"{size}: predicted {each:.0f} s a layer, {hours:.1f} h to quantize (power {power:.2f}), {memory:.1f} GiB"
        )


def main() -> None:
    """Print the tables and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["2b", "7b"])
    parser.add_argument("--layers", nargs="+", type=int, default=[2, 4], help="language layers; one predicts nothing")
    parser.add_argument("--method", default="qe")
    parser.add_argument("--bits", type=float, help="budget of stored bits")
    parser.add_argument("--samples", type=int, default=32, help="calibration samples (default: %(default)s)")
    parser.add_argument("--vision-blocks", type=int, default=VISION["depth"])
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--work", type=Path, help="folder that keeps the models")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        report(arguments.work or Path(scratch), arguments)


def report(work: Path, arguments: argparse.Namespace) -> None:
    """Measure all, and print."""
    found: dict[str, dict[int, dict[str, Cost]]] = {}
    plans: dict[str, dict[int, Cost]] = {}
    for size in arguments.sizes:
        found[size] = {layers: measure(size, layers, work, arguments) for layers in sorted(set(arguments.layers))}
        plans[size] = {layers: planned(size, layers, work, arguments) for layers in found[size]}
    print("\n| size, layers | stage | seconds | GiB | planned seconds, GiB | predicted seconds, GiB | ratio |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for size, runs in found.items():
        whole = SIZES[size]["num_hidden_layers"]
        for stage in arguments.stages:
            costs = {layers: run[stage] for layers, run in runs.items()}
            for number, (layers, cost) in enumerate(costs.items()):
                own = plans[size][layers]
                plan = f"{own.seconds:.0f}, {own.gib:.2f}" if stage == "quantize" else "-"
                told = ratio = "-"
                if number > 1:  # the first two make the line
                    line = at(layers, costs)
                    told = f"{line.seconds:.0f}, {line.gib:.2f}"
                    ratio = f"{line.seconds / cost.seconds:.2f}, {line.gib / cost.gib:.2f}"
                print(
                    f"| {size}, {layers} | {stage} | {cost.seconds:.0f} | {cost.gib:.2f} | {plan} | {told} | {ratio} |"
                )
            if whole not in costs and len(costs) > 1:
                line = at(whole, costs)
                print(f"| {size}, {whole} | {stage} | - | - | - | {line.seconds:.0f}, {line.gib:.2f} | - |")
    if len(found) > 1 and len(set(arguments.layers)) > 1 and "quantize" in arguments.stages:
        predict_others(found, work, arguments)
    costs_found = {
        size: {str(n): {s: asdict(c) for s, c in run.items()} for n, run in runs.items()}
        for size, runs in found.items()
    }
    plans_found = {size: {str(n): asdict(plan) for n, plan in own.items()} for size, own in plans.items()}
    print(json.dumps({"script": "large_model", "costs": costs_found, "planned": plans_found}))


if __name__ == "__main__":
    main()
