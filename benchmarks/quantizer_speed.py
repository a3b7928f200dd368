r"""Time and peak memory of quantizing one decoder layer of Qwen2-VL-2B's shapes, against llm-compressor's GPTQ.

    python -m venv out/peer && out/peer/bin/pip install torch llmcompressor
    python benchmarks/quantizer_speed.py --peer out/peer/bin/python
    python benchmarks/quantizer_speed.py --whole out/vlm     # a whole model, made by assemble_real_vlm.py
    python benchmarks/quantizer_speed.py --device cuda       # time per layer by phase, on a GPU and on the CPU

A model of one Llama decoder layer with random weights (hidden 1536, MLP 8960, 12 heads, 2 for keys and values) sees
random tokens, 128 x 512 by default; `--layers 2` shows what one more costs. The model's files are bfloat16:
llm-compressor runs blocks in that, as its examples do, and in float32. Every quantizer runs in a process of its own,
one after the other; timed is the call that quantizes, without imports and loading. Peak memory is that of the whole
process. With `--repeat` the median of several runs is shown. `--whole` times the language layers of a model in a folder
instead, with its own calibration samples, from its files as `qe-edge quantize` does it.

`--device` times two such layers on a device and one on the CPU, in one process, by phase: whatever a phase calls that
is a phase itself counts there alone. The device finishes its work at the end of every phase.
"""

from __future__ import annotations

import argparse
import importlib
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

SHAPE = {"hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12, "num_key_value_heads": 2}
VOCABULARY = 1000
UNKNOWN = "t0"
OURS = {
    "QE, defaults": {"method": "qe"},
    "QE, nearest rounding": {"method": "qe", "options": {"rounding": "nearest", "clip": False}},
    "QE, as in the paper": {"method": "qe", "preset": "paper"},
    "our GPTQ": {"method": "gptq"},
}
WHOLE = {
    "RTN": {"method": "rtn"},
    "our GPTQ": {"method": "gptq"},
    "QE, defaults": {"method": "qe"},
    "QE, --bits 4.25": {"method": "qe", "budget": {"bits": 4.25}},
}
PHASED = {
    "QE W4A8": {"method": "qe", "scheme": "w4a8"},
    "QE W4A8, --bits 4.25": {"method": "qe", "scheme": "w4a8", "budget": {"bits": 4.25}},
    "GPTQ W3A16": {"method": "gptq", "scheme": "w3a16"},
    "RTN W4A8": {"method": "rtn", "scheme": "w4a8"},
}
PHASES = {  # functions by where they are looked up
    "gradients": ["qe_edge.quantization.measure.output_gradients"],
    "blocks and Gram matrices": ["qe_edge.quantization.walk:BlockWalk.run"],
    "samples and their channels": ["qe_edge.calibration.statistics:StatisticsCollector.finish"],
    "factor of GPTQ's Hessian": ["qe_edge.reconstruction.gptq._coupling"],
    "codes": ["qe_edge.methods.qe.leave_out_channels",
              "qe_edge.methods.gptq.gptq_round"],
    "spaces and covariances": ["qe_edge.reconstruction.directions:ErrorSpace.covariance",
                               "qe_edge.reconstruction.directions:ErrorSpace.lift"],
    "eigenvectors": ["qe_edge.methods.qe.top_eigenvectors", "qe_edge.reconstruction.designs.top_eigenvectors"],
    "guard": ["qe_edge.methods.qe:SharedExpert.objective"],
    "clusters": ["qe_edge.methods.qe.spectral_clusters", "qe_edge.reconstruction.designs.spectral_clusters"],
    "first groups": ["qe_edge.methods.qe.assign_by_mass", "qe_edge.reconstruction.designs.assign_by_mass"],
    "experts": ["qe_edge.methods.qe.gram_experts"],
    "factors": ["qe_edge.methods.qe.store_up_factors", "qe_edge.methods.qe.store_down_factors",
                "qe_edge.methods.qe.pack_correction"],
    "router": ["qe_edge.methods.qe:QuantExperts._router"],
    "candidates: routed": ["qe_edge.reconstruction.offers.routed_losses"],
    "candidates: INT4 factors": ["qe_edge.reconstruction.offers.packing_loss"],
    "candidates: rest": ["qe_edge.quantization.measure.candidates_of"],
    "quantize: rest": ["qe_edge.quantization.quantizer.quantize_problem"],
    "allocation": ["qe_edge.quantization.measure.allocate"],
    "layers packed": ["qe_edge.quantization.quantizer.QELinear"],
}  # fmt: skip
PEERS = {"llm-compressor GPTQ": "auto", "llm-compressor GPTQ, float32": "float32"}  # the type it computes blocks in


def make_model(folder: Path, layers: int, samples: int, tokens: int) -> None:
    """Write the model, its tokenizer and the calibration texts."""
    import numpy as np
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        **SHAPE,
        num_hidden_layers=layers,
        vocab_size=VOCABULARY,
        max_position_embeddings=max(tokens, 512),
        dtype="bfloat16",
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    words = {f"t{index}": index for index in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=UNKNOWN, unk_token=UNKNOWN).save_pretrained(folder)
    drawn = np.random.default_rng(0).integers(3, VOCABULARY, (samples, tokens))  # 1 and 2 begin and end a text
    texts = [" ".join(f"t{index}" for index in row) for row in drawn]
    (folder / "texts.json").write_text(json.dumps(texts), encoding="utf-8")


def quantize_ours(folder: Path, name: str, scheme: str) -> float:
    """Seconds of `qe_edge.quantize`."""
    from qe_edge.models.family import TEXT, Sample
    from qe_edge.models.loading import load_model
    from qe_edge.quantization.quantizer import quantize
    from qe_edge.recipes.recipe import make_recipe

    texts = json.loads((folder / "texts.json").read_text(encoding="utf-8"))
    keys: dict[str, Any] = {**OURS[name], "scheme": scheme}
    loaded = load_model(str(folder))
    samples = [Sample(None, text, kind=TEXT) for text in texts]
    recipe = make_recipe(**keys)
    recipe.build_method()  # imports what it needs
    started = time.perf_counter()
    quantize(loaded, recipe, samples)
    return time.perf_counter() - started


def quantize_whole(folder: Path, name: str, scheme: str, count: int) -> float:
    """Seconds of `qe_edge.quantize` for the language layers of the model in a folder."""
    from qe_edge.calibration.sources import load_samples
    from qe_edge.quantization.quantizer import quantize
    from qe_edge.recipes.recipe import make_recipe

    keys: dict[str, Any] = {**WHOLE[name], "scheme": scheme}
    samples = load_samples(str(folder / "data" / "calibration.jsonl"), count)
    recipe = make_recipe(**keys)
    recipe.build_method()
    with tempfile.TemporaryDirectory() as work:
        started = time.perf_counter()
        quantize(str(folder), recipe, samples, work=Path(work), on_disk=True)
        return time.perf_counter() - started


def quantize_peer(folder: Path, name: str, scheme: str) -> float:
    """Seconds of llm-compressor's `oneshot` with GPTQ."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    texts = json.loads((folder / "texts.json").read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [tokenizer(text, add_special_tokens=False) for text in texts]
    data = Dataset.from_list([{"input_ids": row["input_ids"], "attention_mask": row["attention_mask"]} for row in rows])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=PEERS[name])
    modifier = GPTQModifier(
        targets="Linear", scheme={"w4a16": "W4A16_ASYM", "w4a8": "W4A8"}[scheme], ignore=["lm_head"]
    )
    length = len(rows[0]["input_ids"])
    started = time.perf_counter()
    oneshot(
        model=model, dataset=data, recipe=modifier, max_seq_length=length, num_calibration_samples=len(texts),
        tokenizer=tokenizer,
    )  # fmt: skip
    return time.perf_counter() - started


def run_child(python: str, arguments: list[str]) -> dict[str, float]:
    """Run this script in a role; returns what it prints last."""
    done = subprocess.run([python, __file__, *arguments], check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stderr[-3000:]}")
    result: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


@contextmanager
def phases_timed(device: str) -> Iterator[dict[str, float]]:
    """Seconds of every phase while the context is open; the functions of `PHASES` are wrapped meanwhile."""
    import torch

    seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)
    inner: list[float] = []  # of the phases at work, what was spent in phases inside them

    def wait() -> None:
        if device.startswith("cuda"):
            torch.cuda.synchronize()

    def timed(phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - of any function
            wait()
            started = time.perf_counter()
            inner.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                wait()
                whole = time.perf_counter() - started
                seconds[phase] += whole - inner.pop()
                if inner:
                    inner[-1] += whole

        return call

    with ExitStack() as stack:
        for phase, places in PHASES.items():
            for place in places:
                where, _, name = place.rpartition(".")
                module, _, owner = where.partition(":")
                target = importlib.import_module(module)
                target = getattr(target, owner) if owner else target
                original = getattr(target, name)
                stack.callback(setattr, target, name, original)
                setattr(target, name, timed(phase, original))
        yield seconds


def quantize_phased(folder: Path, name: str, device: str) -> dict[str, Any]:
    """Seconds of `qe_edge.quantize` by phase, and the device's peak memory."""
    import torch

    from qe_edge.models.family import TEXT, Sample
    from qe_edge.models.loading import load_model
    from qe_edge.quantization.quantizer import quantize
    from qe_edge.recipes.recipe import make_recipe

    texts = json.loads((folder / "texts.json").read_text(encoding="utf-8"))
    loaded, recipe = load_model(str(folder)), make_recipe(**PHASED[name])
    samples = [Sample(None, text, kind=TEXT) for text in texts]
    recipe.build_method()
    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    with phases_timed(device) as seconds:
        started = time.perf_counter()
        quantize(loaded, recipe, samples, device=device)
        whole = time.perf_counter() - started
    seconds["rest"] = whole - sum(seconds.values())
    return {"seconds": whole, "phases": seconds, "gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None}


def show_phases(options: argparse.Namespace) -> int:
    """Print the table of `--device`, and a JSON line."""
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        layers = {options.device: 2, "cpu": 1}
        for device, count in layers.items():
            make_model(Path(folder) / device.replace(":", ""), count, options.samples, options.tokens)
        make_model(Path(folder) / "first", 1, 8, 64)
        quantize_phased(Path(folder) / "first", options.only[0], options.device)  # what a device starts with once
        wanted = [(name, options.device) for name in options.only]
        wanted += [] if options.no_cpu else [(options.only[0], "cpu")]
        for name, device in wanted:
            found = quantize_phased(Path(folder) / device.replace(":", ""), name, device)
            per_layer = {phase: value / layers[device] for phase, value in found["phases"].items()}
            rows[f"{name}, {device}"] = {**found, "layers": layers[device], "per_layer": per_layer}
            memory = "" if found["gib"] is None else f"   GPU memory {found['gib']:.2f} GiB"
            print(f"{name}, {device}: {found['seconds'] / layers[device]:.2f} s a layer{memory}", flush=True)
            for phase, value in per_layer.items():
                print(f"    {phase:36} {value:7.3f} s", flush=True)
    print(json.dumps({"script": "quantizer_speed", "device": options.device, "rows": rows}))
    return 0


def main() -> int:
    """Run everything, print a table and a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="python of an environment with llmcompressor")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--scheme", choices=("w4a16", "w4a8"), default="w4a16")
    parser.add_argument("--role", nargs=2, metavar=("NAME", "FOLDER"), help=argparse.SUPPRESS)
    parser.add_argument("--device", help="time per layer by phase on this device, and on the CPU")
    parser.add_argument("--only", nargs="+", choices=list(PHASED), default=list(PHASED), help="with --device")
    parser.add_argument("--no-cpu", action="store_true", help="with --device: without the CPU's row")
    parser.add_argument("--whole", type=Path, metavar="FOLDER", help="a model to quantize as a whole instead")
    options = parser.parse_args()
    if options.role:
        name, folder = options.role[0], Path(options.role[1])
        if options.whole:
            seconds = quantize_whole(folder, name, options.scheme, options.samples)
        elif name in PEERS:
            seconds = quantize_peer(folder, name, options.scheme)
        else:
            seconds = quantize_ours(folder, name, options.scheme)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(json.dumps({"seconds": seconds, "peak_gib": peak}))
        return 0
    if options.device:
        return show_phases(options)
    names = list(WHOLE) if options.whole else [*OURS, *(PEERS if options.peer else [])]
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        if not options.whole:
            make_model(Path(folder), options.layers, options.samples, options.tokens)
        for name in names:
            python = options.peer if name in PEERS else sys.executable
            arguments = ["--role", name, str(options.whole or folder), "--scheme", options.scheme]
            if options.whole:
                arguments += ["--whole", str(options.whole), "--samples", str(options.samples)]
            runs = [run_child(python, arguments) for _ in range(options.repeat)]
            found[name] = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
            print(f"{name:30} {found[name]['seconds']:7.1f} s   peak {found[name]['peak_gib']:.2f} GiB", flush=True)
    for peer in [name for name in PEERS if name in found]:
        for name in OURS:
            print(f"{name:24} x {found[peer]['seconds'] / found[name]['seconds']:.2f} as fast as {peer}")
    print(
        json.dumps(
            {
                "script": "quantizer_speed",
                "layers": options.layers,
                "samples": options.samples,
                "tokens": options.tokens,
                "rows": found,
            }
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
