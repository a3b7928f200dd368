"""Rows for the prediction from the file of the plugin's device check."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.kit_rows import main

CHECK = Path(__file__).resolve().parent.parent / "report" / "device.json"


def test_what_was_measured_replaces_its_rows_and_the_others_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = json.loads(CHECK.read_text(encoding="utf-8"))
    whole = {"k": 64, "n": 32, "tokens": 1024, "mode": "w4a8, 64 in INT4", "block_rows": 0, "of_launches": 2}
    check["linears"] = [
        {**whole, "launches": 2, "microseconds": 5.004},
        {**whole, "launches": 1, "microseconds": 2.0},
        {**whole, "launches": 2, "block_rows": 128, "microseconds": 4.0},
    ]
    check["peer_linears"] = [{**whole, "peer": "cuBLAS FP16", "microseconds": 7.0}]
    (tmp_path / "device.json").write_text(json.dumps(check), encoding="utf-8")
    old = {
        "k": 64,
        "n": 32,
        "tokens": 1024,
        "w4a8 r64 int4": 99.0,
        "w4a8 launches (0,)": 9.0,
        "Edge-LLM W4A16 g128": 6.0,
    }
    edge = {"model": "2B", "tokens": 1, "kind": "Edge-LLM W4A16 g128", "microseconds": 591, "megabytes": 600}
    rows = {"older": "stays", "linears": [old], "steps": [edge, {**edge, "kind": "w4a8", "microseconds": 1}]}
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["kit_rows.py", str(tmp_path / "device.json"), str(tmp_path / "rows.json")])
    main()
    found = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))
    assert found["linears"] == [
        {"k": 64, "n": 32, "tokens": 1024, "Edge-LLM W4A16 g128": 6.0, "w4a8 r64 int4": 5.0,
         "w4a8 r64 int4 launches (0,)": 2.0, "cuBLAS FP16": 7.0}
    ]  # fmt: skip
    assert found["steps"][0] == edge
    assert {"model": "2B", "tokens": 1, "kind": "w4a8", "microseconds": 1000, "megabytes": 660} in found["steps"]
    assert [row["kind"] for row in found["steps"]].count("w4a8") == len(
        [s for s in check["steps"] if s["mode"] == "w4a8"]
    )
    assert (found["older"], found["date"], found["commit"]) == ("stays", check["date"][:10], check["commit"])
