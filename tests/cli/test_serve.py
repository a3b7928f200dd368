"""`qe-edge serve` as a process: it says where it listens, and SIGTERM lets running answers end."""

from __future__ import annotations

import signal
import socket
import subprocess
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest

from qe_edge.runtime.answer_options import Options
from qe_edge.runtime.pipeline import Pipeline
from tests.cli.running import CHILD, Run, assert_two_lines
from tests.conftest import Exported


@contextmanager
def serving(folder: Path, *words: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process and its address."""
    command = [*CHILD, "serve", str(folder), "--port", "0", "--threads", "1", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            name, _, address = process.stdout.readline().strip().partition(": ")
            assert name == "shapes", process.communicate(timeout=30)
            yield process, address
        finally:
            process.kill()


@pytest.mark.slow
def test_sigterm_under_load(exported: Exported) -> None:
    """Requests that were taken are answered whole and rightly, no other one is, and the exit code is 0."""
    options: Options = {"temperature": 50.0, "top_k": 0, "max_new_tokens": 250}
    pipeline = Pipeline.from_dir(exported.onnx, threads=1, max_context=512)
    seeds = range(6)
    expected = [pipeline("?", seed=seed, **options) for seed in seeds]
    with serving(exported.onnx, "--name", "shapes", "--max-context", "512") as (process, address):
        client = openai.OpenAI(base_url=address, api_key="none", max_retries=0, timeout=60)

        def ask(seed: int) -> str | None:
            found = client.chat.completions.create(
                model="shapes",
                messages=[{"role": "user", "content": "?"}],
                temperature=50,
                max_tokens=250,
                seed=seed,
                extra_body={"top_k": 0},
            )
            return found.choices[0].message.content

        with ThreadPoolExecutor() as pool:
            asked = [pool.submit(ask, seed) for seed in seeds]
            metrics = address.removesuffix("v1") + "metrics"
            while not all(line in fetched(metrics) for line in ("qe_edge_running 1.0", "qe_edge_waiting 5.0")):
                assert not any(answer.done() for answer in asked)
            process.send_signal(signal.SIGTERM)
            assert [answer.result() for answer in asked] == [answer.text for answer in expected]
        assert process.wait(timeout=30) == 0, process.communicate()
        with pytest.raises(openai.APIConnectionError):
            ask(0)


def fetched(address: str) -> str:
    with urllib.request.urlopen(address, timeout=10) as response:  # noqa: S310 - our own server
        return str(response.read().decode())


def test_what_cannot_be_served(exported: Exported, cli: Run, tmp_path: Path) -> None:
    folder = exported.onnx
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert_two_lines(cli("serve", folder, "--port", port), "cannot listen on 127.0.0.1", "another --port")
    assert_two_lines(cli("serve", folder, "--host", "192.0.2.1"), "cannot listen on 192.0.2.1", "as --host")
    assert_two_lines(cli("serve", exported.checkpoint), "only PyTorch runs", "qe-edge export")
    assert_two_lines(cli("serve", folder, "--api-key-file", tmp_path), "cannot be read", "--api-key-file")
    assert_two_lines(cli("serve", folder, "--picture-folder", tmp_path / "a"), "no folder", "--picture-folder")
    assert_two_lines(cli("serve", folder, "--port", 0, "--max-context", 100000), "100000", "--max-context")
