"""OpenAI's client against the server: answers, pieces, refusals, limits, and clients that go away."""

from __future__ import annotations

import base64
import http.client
import json
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import openai
import pytest
from PIL import Image

from qe_edge.calibration.sources import load_evaluation
from qe_edge.models.family import Sample
from qe_edge.runtime.engine import VisionLanguageEngine
from qe_edge.runtime.pipeline import Pipeline
from qe_edge.server.jobs import Jobs
from qe_edge.server.pictures import bounded, picture_source
from qe_edge.server.settings import ServerSettings, read_api_key
from qe_edge.system.errors import InputError
from tests.server.conftest import MODEL, Served, serving

QUESTIONS = load_evaluation("demo")[:8]
DRAW: dict[str, Any] = {"temperature": 1.5, "seed": 7, "max_tokens": 12}
LONG = [{"role": "user", "content": "what color is it?"}]


def messages(sample: Sample) -> list[Any]:
    content = base64.b64encode(Path(str(sample.image)).read_bytes()).decode()
    url = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{content}"}}
    return [{"role": "user", "content": [url, {"type": "text", "text": sample.question}]}]


def wait_until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_answers_are_the_pipelines(served: Served, engine: VisionLanguageEngine) -> None:
    pipeline = Pipeline(engine)
    for sample in QUESTIONS[:3]:
        expected = pipeline(sample, temperature=1.5, seed=7, max_new_tokens=12)
        found = served.client.chat.completions.create(model=MODEL, messages=messages(sample), **DRAW)
        assert found.choices[0].message.content == expected.text
        assert found.choices[0].finish_reason == expected.finish_reason == "length"
        assert found.usage is not None
        assert found.usage.prompt_tokens == expected.timings.prompt_tokens
        assert found.usage.completion_tokens == 12


def test_pieces_are_the_answer(served: Served) -> None:
    arguments: dict[str, Any] = {"model": MODEL, "messages": messages(QUESTIONS[0]), **DRAW}
    whole = served.client.chat.completions.create(**arguments).choices[0].message.content
    usage = {"include_usage": True}
    chunks = list(served.client.chat.completions.create(stream=True, stream_options=usage, **arguments))
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks[:-1]]
    assert "".join(texts) == whole
    assert len([text for text in texts if text]) > 3
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-2:] == [None, "length"]
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 12
    assert {chunk.id for chunk in chunks} == {chunks[0].id}


def test_options_are_passed_on(served: Served, engine: VisionLanguageEngine) -> None:
    more = {"top_k": 20, "min_p": 0.001, "repetition_penalty": 1.2}
    given: dict[str, Any] = {"temperature": 0.9, "top_p": 0.95, "seed": 3}
    conversation: list[Any] = [
        {"role": "developer", "content": "Be brief."},
        *messages(QUESTIONS[0]),
        {"role": "assistant", "content": "a circle", "refusal": None},
        {"role": "user", "content": "what color is it?"},
    ]
    found = served.client.chat.completions.create(
        model=MODEL,
        messages=conversation,
        max_completion_tokens=9,
        stop=["zzz"],
        extra_body=more,
        user="me",
        n=1,
        **given,
    )
    earlier = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTIONS[0].question}]
    spoken = [*earlier, {"role": "assistant", "content": "a circle"}, conversation[-1]]
    expected = Pipeline(engine)(spoken, QUESTIONS[0].image, max_new_tokens=9, **given, **more)
    assert found.choices[0].message.content == expected.text


def test_models_health_and_metrics(served: Served) -> None:
    assert [model.id for model in served.client.models.list()] == [MODEL]
    status, body = get(served.port, "/health")
    assert (status, json.loads(body)) == (200, {"status": "ok"})
    served.client.chat.completions.create(model=MODEL, messages=LONG, max_tokens=2)  # type: ignore[arg-type]
    status, body = get(served.port, "/metrics")
    assert status == 200
    assert b'qe_edge_requests_total{outcome="answered"}' in body
    assert served.count('qe_edge_tokens_total{kind="answer"}') >= 2


def get(port: int, path: str, method: str = "GET", body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    response = connection.getresponse()
    found = response.status, response.read()
    connection.close()
    return found


@pytest.mark.parametrize(
    ("change", "status", "words"),
    [
        ({"model": "other"}, 404, "Ask for 'shapes'"),
        ({"messages": []}, 400, "'messages' is wrong"),
        ({"messages": [{"role": "user"}]}, 400, "not just 'role' and 'content'"),
        ({"messages": [{"role": "user", "content": "a\0"}]}, 400, "NUL"),
        ({"n": 2}, 400, "does not do n = 2"),
        ({"tools": [{"type": "function"}]}, 400, "does not do tools"),
        ({"logprobs": True}, 400, "does not do logprobs"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format"),
        ({"max_tokens": 0}, 400, "'max_tokens' is wrong"),
        ({"max_tokens": 3, "max_completion_tokens": 3}, 400, "Keep one of them"),
        ({"max_tokens": 100000}, 400, "together at most"),
        ({"temperature": "hot"}, 400, "'temperature' is wrong"),
        ({"temperature": -1}, 400, "temperature is -1"),
        ({"seed": -1}, 400, "seed is -1"),
        ({"stop": ["a"] * 20}, 400, "stop strings"),
        ({"best_of": 3}, 400, "'best_of' is wrong"),
        ({"stream": True, "max_tokens": 100000}, 400, "together at most"),
    ],
)
def test_requests_that_are_refused(served: Served, change: dict[str, Any], status: int, words: str) -> None:
    request = json.dumps({"model": MODEL, "messages": LONG, **change}).encode()
    found, body = get(served.port, "/v1/chat/completions", "POST", request, Content_Type="application/json")
    assert found == status, body
    assert words in json.loads(body)["error"]["message"]


def picture(url: object) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]}


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("/etc/passwd", "opens no files"),
        ("file:///etc/passwd", "opens no files"),
        ("http://127.0.0.1/a.png", "downloads nothing"),
        ("https://[::1/a.png", "is no address"),
        ("data:image/png;base64,AAAA", "not a picture"),
        ("data:image/png;base64,A", "base64 is damaged"),
        (3, "no address"),
    ],
)
def test_pictures_that_are_refused(served: Served, url: object, words: str) -> None:
    request = json.dumps({"model": MODEL, **picture(url)}).encode()
    found, body = get(served.port, "/v1/chat/completions", "POST", request, Content_Type="application/json")
    assert found == 400, body
    assert words in json.loads(body)["error"]["message"]


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"type": "video_url", "video_url": {"url": "/etc"}}, "opens no files"),
        ({"type": "video_url", "video_url": {"url": "http://127.0.0.1/a.mp4"}}, "downloads nothing"),
        ({"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}}, "no video of a known format"),
        ({"type": "video", "video": ["data:image/png;base64,AAAA"] * 17}, "has 17 pictures"),
        ({"type": "video", "video": []}, "no frames"),
        ({"type": "video", "video": 3}, "no address"),
    ],
)
def test_videos_that_are_refused(served: Served, part: dict[str, Any], words: str) -> None:
    request = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": [part]}]}).encode()
    found, body = get(served.port, "/v1/chat/completions", "POST", request, Content_Type="application/json")
    assert found == 400, body
    assert words in json.loads(body)["error"]["message"]


def test_the_pixels_of_a_request_are_bounded(tmp_path: Path) -> None:
    Image.new("RGB", (20, 10)).save(tmp_path / "a.png")
    settings = ServerSettings(MODEL, picture_folder=tmp_path)
    first, second = (bounded(picture_source(settings), 500) for _ in range(2))
    for open_source in (first, second):  # each request has its own bound
        open_source("a.png")
        open_source("a.png")
    with pytest.raises(InputError, match="more than 500 pixels in all"):
        first("a.png")


def test_bodies_that_are_refused(engine: VisionLanguageEngine) -> None:
    path, kind = "/v1/chat/completions", {"Content_Type": "application/json"}
    with serving(engine, max_request_bytes=1000, request_seconds=0.3, max_pictures=1) as served:
        assert get(served.port, path, "POST", b"{", **kind)[0] == 400
        assert get(served.port, path, "POST", b"[1]", **kind)[0] == 400
        assert get(served.port, path, "POST", b"[" * 900, **kind)[0] == 400
        assert get(served.port, path, "POST", b'{"a": "\xff"}', **kind)[0] == 400
        assert get(served.port, path, "POST", b"{}", Content_Type="text/plain")[0] == 415  # as any web page may send
        assert get(served.port, path, "POST", b"a" * 2000, **kind)[0] == 413
        two = picture("data:image/png;base64,!")["messages"][0]["content"] * 2  # counted before they are opened
        request = {"model": MODEL, "messages": [{"role": "user", "content": two}]}
        status, body = get(served.port, path, "POST", json.dumps(request).encode(), **kind)
        assert (status, "has 2 pictures" in body.decode()) == (400, True)
        half = json.dumps({"model": MODEL, **picture("\ud800.png")}).encode()  # of a pair: no text that UTF-8 can hold
        status, body = get(served.port, path, "POST", half, **kind)
        assert (status, r"opens no files: '\\ud800.png'" in body.decode()) == (400, True)
        with socket.create_connection(("127.0.0.1", served.port), timeout=10) as slow:
            slow.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n")
            slow.sendall(b"Content-Length: 100\r\n\r\n{")
            assert b" 408 " in slow.recv(1000).partition(b"\r\n")[0]


def test_the_api_key(engine: VisionLanguageEngine, tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("secret-1\n", encoding="ascii")
    with serving(engine, key="secret-1", api_key=read_api_key(file)) as served:
        assert served.client.models.list().data
        with pytest.raises(openai.AuthenticationError, match="API key is missing or wrong"):
            served.client.with_options(api_key="other").models.list()
        assert get(served.port, "/metrics")[0] == 401
        assert get(served.port, "/health")[0] == 200
    file.write_text("two words", encoding="ascii")
    for path in (file, tmp_path / "none"):
        with pytest.raises(InputError, match="key"):
            read_api_key(path)


def test_more_requests_than_may_wait(slow: VisionLanguageEngine) -> None:
    with serving(slow, slots=1, queue=1) as served:

        def ask() -> str:
            found = served.client.chat.completions.create(model=MODEL, messages=LONG, max_tokens=15)  # type: ignore[arg-type]
            return str(found.choices[0].finish_reason)

        with ThreadPoolExecutor() as pool:
            first, second = pool.submit(ask), pool.submit(ask)
            wait_until(lambda: served.count("qe_edge_waiting") == 1)
            with pytest.raises(openai.RateLimitError, match="1 requests wait already") as caught:
                ask()
            assert 1 <= int(caught.value.response.headers["retry-after"]) <= 60
            assert (first.result(), second.result()) == ("length", "length")
        assert served.count('qe_edge_requests_total{outcome="busy"}') == 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away(slow: VisionLanguageEngine, stream: bool) -> None:
    """Its answer ends, long before it would have been made."""
    body = json.dumps({"model": MODEL, "messages": LONG, "stream": stream}).encode()
    head = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with serving(slow) as served:
        with socket.create_connection(("127.0.0.1", served.port), timeout=10) as client:
            client.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\n" + head + body)
            wait_until(lambda: served.count("qe_edge_running") == 1)
            if stream:
                assert client.recv(10)
        gone = time.monotonic()
        wait_until(lambda: served.count("qe_edge_running") == 0)
        assert time.monotonic() - gone < 5
        wait_until(lambda: served.count('qe_edge_requests_total{outcome="disconnected"}') == 1)


def test_a_client_that_goes_away_before_it_has_asked(engine: VisionLanguageEngine) -> None:
    head = b"Host: a\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
    with serving(engine) as served:
        with socket.create_connection(("127.0.0.1", served.port), timeout=10) as client:
            client.sendall(b"POST /v1/chat/completions HTTP/1.1\r\n" + head)
        wait_until(lambda: served.count('qe_edge_requests_total{outcome="disconnected"}') == 1)


def test_answers_end_while_the_others_are_stopped(engine: VisionLanguageEngine) -> None:
    jobs = Jobs(Pipeline(engine), ServerSettings(MODEL))

    class Ending:
        def cancel(self) -> None:
            jobs._taken.discard(self)

    jobs._taken.update([Ending(), Ending()])  # type: ignore[list-item]
    jobs.stop()
    assert not jobs._taken


def test_an_answer_that_takes_too_long(slow: VisionLanguageEngine) -> None:
    with serving(slow, answer_seconds=0.3) as served:
        with pytest.raises(openai.InternalServerError, match="takes too long") as caught:
            served.client.chat.completions.create(model=MODEL, messages=LONG)  # type: ignore[arg-type]
        assert caught.value.status_code == 504
        wait_until(lambda: served.count("qe_edge_running") == 0)


def test_a_stop_ends_what_runs(slow: VisionLanguageEngine) -> None:
    """After the time of grace clients are told, and no thread is left."""
    others = [thread for thread in threading.enumerate() if thread.name.startswith("answer")]
    with serving(slow) as served, ThreadPoolExecutor() as pool:
        wait_until(lambda: get(served.port, "/health")[0] == 200)
        served.server.stopping = True
        with pytest.raises(openai.InternalServerError, match="is stopping"):
            served.client.chat.completions.create(model=MODEL, messages=LONG)  # type: ignore[arg-type]
        assert get(served.port, "/health")[0] == 503
        served.server.stopping = False
        asked = pool.submit(served.client.chat.completions.create, model=MODEL, messages=LONG)  # type: ignore[arg-type]
        wait_until(lambda: served.count("qe_edge_running") == 1)
        served.server._jobs.stop()
        with pytest.raises(openai.InternalServerError, match="is stopping"):
            asked.result(timeout=30)
    assert [thread for thread in threading.enumerate() if thread.name.startswith("answer")] == others


class Host(BaseHTTPRequestHandler):
    """Serves one picture, and an address that leads elsewhere."""

    def do_GET(self) -> None:
        if self.path == "/moved.png":
            self.send_response(302)
            self.send_header("Location", "http://elsewhere/a.png")
            self.end_headers()
            return
        self.send_response(200 if self.path == "/a.png" else 404)
        self.end_headers()
        self.wfile.write(Path(str(QUESTIONS[0].image)).read_bytes())

    def log_message(self, *arguments: object) -> None:
        """Nothing."""


@pytest.fixture
def host() -> Iterator[int]:
    with HTTPServer(("127.0.0.1", 0), Host) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


def test_files_and_hosts_that_are_allowed(engine: VisionLanguageEngine, tmp_path: Path, host: int) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    shutil.copy(str(QUESTIONS[0].image), folder / "a.png")
    shutil.copy(str(QUESTIONS[0].image), tmp_path / "b.png")
    (folder / "link.png").symlink_to(tmp_path / "b.png")
    expected = Pipeline(engine)("?", QUESTIONS[0].image, max_new_tokens=8).text
    question = {"type": "text", "text": "?"}
    with serving(engine, picture_folder=folder, picture_hosts=("127.0.0.1",)) as served:

        def ask(url: str) -> str | None:
            content = [{"type": "image_url", "image_url": {"url": url}}, question]
            asked: list[Any] = [{"role": "user", "content": content}]
            found = served.client.chat.completions.create(model=MODEL, messages=asked, max_tokens=8, temperature=0)
            return found.choices[0].message.content

        for url in ("a.png", f"file://{folder}/a.png", f"http://127.0.0.1:{host}/a.png"):
            assert ask(url) == expected
        for url, words in (
            ("../b.png", "outside"),
            ("link.png", "outside"),
            ("file:///etc/passwd", "outside"),
            ("none.png", "no picture"),
            (f"http://127.0.0.1:{host}/b.png", "status 404"),
            (f"http://127.0.0.1:{host}/moved.png", "on to another"),
            (f"http://localhost:{host}/a.png", "downloads nothing from 'localhost'"),
            (f"http://a@127.0.0.1:{host}/a.png", "downloads nothing"),
            ("http://127.0.0.1:1/a.png", "could not be downloaded"),
        ):
            with pytest.raises(openai.BadRequestError, match=words):
                ask(url)


def test_many_clients_get_their_own_answers(served: Served, engine: VisionLanguageEngine) -> None:
    """A small version of benchmarks/serve_load.py."""
    pipeline = Pipeline(engine)
    expected = {number: pipeline(sample, max_new_tokens=5).text for number, sample in enumerate(QUESTIONS)}

    def ask(number: int) -> bool:
        asked = messages(QUESTIONS[number % len(QUESTIONS)])
        found = served.client.chat.completions.create(model=MODEL, messages=asked, max_tokens=5)
        return found.choices[0].message.content == expected[number % len(QUESTIONS)]

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(ask, range(64)))
