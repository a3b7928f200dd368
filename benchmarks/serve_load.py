"""Many clients on a server of few slots: nothing is lost, answers are right, memory is flat, SIGTERM lets them end.

    python benchmarks/serve_load.py out/demo/engines/cpu
    python benchmarks/serve_load.py out/demo/engines/cpu --clients 64 --slots 2 --seconds 120

Every client asks questions of the demo without a pause, in turn whole and in pieces; every twentieth goes away in the
middle. Right is what one pipeline answers alone. Memory is the server's resident one, compared over the last three
quarters of the time. At the end the server gets SIGTERM while all clients ask: answers that it began must be right.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import openai
import psutil

from qe_edge.calibration.sources import load_evaluation
from qe_edge.runtime.pipeline import Pipeline

QUESTIONS = 50
AWAY = 20  # every so manieth request of a client is dropped in the middle
TOKENS = 8
ENDED = ("stopping", "Connection error", "incomplete chunked read", "Server disconnected", "peer closed")


class Clients:
    """Threads that ask until they are told to stop.

    Args:
        address: Of the server.
        count: How many.
    """

    def __init__(self, address: str, count: int, questions: list[tuple[list[Any], str]]) -> None:
        self.outcomes: Counter[str] = Counter()
        self.seconds: list[float] = []
        self.stopped = threading.Event()
        self.ending = False
        self._client = openai.OpenAI(base_url=address, api_key="none", max_retries=0, timeout=120)
        self._questions = questions
        self._threads = [threading.Thread(target=self._ask_on, args=(number,)) for number in range(count)]

    def start(self) -> None:
        """Begin to ask."""
        for thread in self._threads:
            thread.start()

    def join(self) -> None:
        """Wait until all have their last answer."""
        for thread in self._threads:
            thread.join()

    def _ask_on(self, number: int) -> None:
        draw = random.Random(number)
        for turn in range(1, 1 << 30):
            if self.stopped.is_set():
                return
            messages, expected = draw.choice(self._questions)
            began = time.perf_counter()
            try:
                outcome = self._ask(messages, expected, turn)
            except openai.RateLimitError:
                outcome = "busy"
            except Exception as error:  # noqa: BLE001 - whatever happens is counted
                outcome = "refused at the end" if self.ending and _of_the_end(error) else f"lost: {error!r}"
            self.outcomes[outcome] += 1
            self.seconds.append(time.perf_counter() - began)
            if outcome == "refused at the end":
                return

    def _ask(self, messages: list[Any], expected: str, turn: int) -> str:
        asked: dict[str, Any] = {"model": "load", "messages": messages, "max_tokens": TOKENS, "temperature": 0}
        if turn % 2:
            found = self._client.chat.completions.create(**asked).choices[0].message.content
            return "right" if found == expected else "wrong"
        text = ""
        with self._client.chat.completions.create(stream=True, **asked) as stream:
            for chunk in stream:
                if turn % AWAY == 0:
                    return "went away"
                text += chunk.choices[0].delta.content or ""
                if chunk.choices[0].finish_reason:
                    return "right" if text == expected else "wrong"
        return "lost: the pieces ended without a reason"


def _of_the_end(error: Exception) -> bool:
    """Whether a request was not taken, or told of the end, because the server stopped."""
    return any(words in str(error) for words in ENDED)


def questions(folder: Path) -> list[tuple[list[Any], str]]:
    """Conversations, and what a pipeline answers alone."""
    pipeline = Pipeline.from_dir(folder, threads=1, max_context=512)
    found = []
    for sample in load_evaluation("demo")[:QUESTIONS]:
        content = base64.b64encode(Path(str(sample.image)).read_bytes()).decode()
        url = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{content}"}}
        messages = [{"role": "user", "content": [url, {"type": "text", "text": sample.question}]}]
        found.append((messages, pipeline(sample, max_new_tokens=TOKENS, temperature=0).text))
    return found


def watch_memory(process: subprocess.Popen[str], seconds: float) -> np.ndarray:
    """Resident MiB of a process, once a second."""
    found, end = [], time.monotonic() + seconds
    while time.monotonic() < end:
        found.append(psutil.Process(process.pid).memory_info().rss / 2**20)
        time.sleep(1)
    return np.array(found)


def main() -> None:
    """Print what happened, and a line of JSON; the exit code is 1 if a goal was missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="engines or graphs for ONNX Runtime of the demo")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--slots", type=int, default=2)
    parser.add_argument("--seconds", type=int, default=120)
    arguments = parser.parse_args()
    asked = questions(arguments.folder)
    words = ["serve", str(arguments.folder), "--port", "0", "--name", "load", "--threads", "1", "--max-context", "512"]
    words += ["--slots", str(arguments.slots), "--queue", str(arguments.clients)]
    call = f"import sys; from qe_edge.cli import main; sys.exit(main({words!r}))"
    with subprocess.Popen([sys.executable, "-c", call], stdout=subprocess.PIPE, text=True) as server:
        address = str(server.stdout and server.stdout.readline()).strip().partition(": ")[2]
        clients = Clients(address, arguments.clients, asked)
        clients.start()
        memory = watch_memory(server, arguments.seconds)
        before = dict(clients.outcomes)
        clients.ending = True
        os.kill(server.pid, signal.SIGTERM)
        stopped = time.monotonic()
        code = server.wait()
        stop_seconds = time.monotonic() - stopped
        clients.stopped.set()
        clients.join()
    late = memory[len(memory) // 4 :]
    found = {
        "clients": arguments.clients,
        "slots": arguments.slots,
        "seconds": arguments.seconds,
        "outcomes": before,
        "outcomes_with_the_end": dict(clients.outcomes),
        "answers_per_second": round(before.get("right", 0) / arguments.seconds, 1),
        "latency_ms": [round(float(x)) for x in np.percentile(np.array(clients.seconds) * 1e3, [50, 90, 99])],
        "resident_mib": [round(float(x)) for x in (memory[0], late[0], late.max(), late[-1])],
        "exit_code": code,
        "stop_seconds": round(stop_seconds, 2),
    }
    for name, value in found.items():
        print(f"{name}: {value}")
    print(json.dumps(found))
    allowed = {"right", "went away", "refused at the end"}
    kept = code == 0 and set(clients.outcomes) <= allowed and bool(late.max() <= 1.05 * late[0])
    sys.exit(0 if kept else 1)


if __name__ == "__main__":
    main()
