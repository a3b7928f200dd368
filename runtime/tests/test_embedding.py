"""An embedding of INT8 codes: C++ answers as Python does, and a damaged file is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from qe_edge.models.samples import Sample
from qe_edge.runtime.embedding import EMBEDDING, TokenEmbedding
from qe_edge.runtime.engine import VisionLanguageEngine
from qe_edge.runtime.manifest import read_manifest
from qe_edge.runtime.sampling import Sampling
from safetensors.numpy import save_file
from test_answers import NEW, Runner, asked, python_ids
from test_folder import edit_and_seal

QUESTION = "what is in the picture?"
SEEDS = 6


@pytest.fixture
def rounded(folder: Path, tmp_path: Path) -> Path:
    """The demo's folder with rows of codes in place of the table."""
    copy = tmp_path / "folder"
    shutil.copytree(folder, copy)
    manifest = read_manifest(folder)
    sizes = manifest.vocab_size, manifest.hidden_size
    table = TokenEmbedding(folder, *sizes)(np.arange(sizes[0]))
    scales = (np.abs(table).max(1) / 127 + 1e-9).astype(np.float32)
    scales[::2] *= 8  # so that no row may have another's
    write(copy, {"embedding": np.round(table / scales[:, None]).astype(np.int8), "scales": scales})
    return copy


def write(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    """Put tensors into the folder's embedding, and seal it as if an export had written them."""
    save_file(tensors, folder / EMBEDDING)
    seal(folder)


def seal(folder: Path) -> None:
    data = (folder / EMBEDDING).read_bytes()
    entry = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    edit_and_seal(folder, lambda table: table["files"].update({EMBEDDING: entry}))


def test_answers_are_pythons(rounded: Path, build: Path, onnxruntime: Path, tmp_path: Path) -> None:
    runner = Runner(build / "tests/answer", rounded, onnxruntime, tmp_path)
    engine = VisionLanguageEngine.load(rounded, threads=1)
    sampling = Sampling(temperature=5.0, top_k=50)
    options = {"max_new_tokens": NEW, "temperature": 5.0, "top_k": 50}
    requests = [{"turns": [[asked(QUESTION)]], "options": options | {"seed": seed}} for seed in range(SEEDS)]
    wanted = [python_ids(engine, Sample((), QUESTION), sampling, seed) for seed in range(SEEDS)]
    assert [answer["answers"][0]["ids"] for answer in runner(requests)] == wanted
    assert sum(map(len, wanted)) > 2 * SEEDS  # tokens that were drawn were embedded, too


def change_header(folder: Path, **changes: object) -> None:
    """Rewrite an entry of the header: `scales__shape=[1]`."""
    data = (folder / EMBEDDING).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    for name, value in changes.items():
        tensor, key = name.split("__")
        header[tensor][key] = value
    text = json.dumps(header).encode()
    (folder / EMBEDDING).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    seal(folder)


CASES = {
    "its header is wrong": lambda folder, _: write(folder, {"embedding": np.zeros((2048, 256), np.int8)}),
    "it should have a scale for every row": lambda folder, _: change_header(folder, scales__shape=[1]),
    "a tensor does not lie inside it": lambda folder, size: change_header(
        folder, scales__data_offsets=[1 << 40, size + (1 << 40)]
    ),
    "rows of 256": lambda folder, _: change_header(folder, embedding__shape=[1 << 40, 256]),
}


@pytest.mark.parametrize("said", list(CASES))
def test_damage_is_said(said: str, rounded: Path, build: Path, onnxruntime: Path) -> None:
    CASES[said](rounded, 4 * 2048)
    command = [build / "tests/answer", rounded, onnxruntime]
    done = subprocess.run(command, input=b"", capture_output=True, check=False)
    assert done.returncode == 1, done.stderr.decode()[-2000:]
    assert said in done.stderr.decode()
