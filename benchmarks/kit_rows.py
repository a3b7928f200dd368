"""Turn what the plugin's device check wrote into the rows that predict_error.py reads.

    python benchmarks/kit_rows.py out/device.json benchmarks/results/h100.json

Rows of the second file that the check did not measure, such as those of TensorRT Edge-LLM, stay as they are.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

KINDS = {
    "w4a8": "w4a8",
    "w4a8, 64 in INT4": "w4a8 r64 int4",
    "w4a8, 64 + 8 x 32 in float16": "w4a8 paper 64+8x32 f16",
    "w4a16 g128": "w4a16 g128z",
    "w3a8": "w3a8",
}
"""Modes of the check, by the names that the rows have."""
PEERS = {"cuBLAS FP16": "cuBLAS FP16", "cuBLAS INT8": "cuBLAS INT8", "torch INT4 g128": "torch INT4 (bf16, g128)"}


def linear_rows(check: dict[str, Any], kept: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of single linears `{k, n, tokens, kind: microseconds}`, in the order of their widths and tokens."""
    measured = {*KINDS.values(), *PEERS.values()}
    rows: dict[tuple[int, int, int], dict[str, Any]] = {}
    for row in kept:
        others = {name: value for name, value in row.items() if name.partition(" launches ")[0] not in measured}
        rows[row["k"], row["n"], row["tokens"]] = others

    def put(entry: dict[str, Any], name: str) -> None:
        key = entry["k"], entry["n"], entry["tokens"]
        row = rows.setdefault(key, dict(zip(("k", "n", "tokens"), key, strict=True)))
        row[name] = round(entry["microseconds"], 2)

    for entry in check["linears"]:
        if entry["block_rows"]:
            continue  # the plan's own choice is what is predicted
        parts = "" if entry["launches"] == entry["of_launches"] else f" launches {tuple(range(entry['launches']))}"
        put(entry, KINDS[entry["mode"]] + parts)
    for entry in check["peer_linears"]:
        if entry["peer"] in PEERS:
            put(entry, PEERS[entry["peer"]])
    return [rows[key] for key in sorted(rows)]


def step_rows(check: dict[str, Any], kept: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of whole steps."""
    names = KINDS | PEERS
    rows = [row for row in kept if row["kind"] not in names.values()]
    for entry in [*check["steps"], *check["peer_steps"]]:
        kind = names[entry.get("mode") or entry["peer"]]
        model, megabytes = entry["model"].rpartition("-")[2], round(entry["bytes"] / 1e6)
        rows.append(
            {"model": model, "tokens": entry["tokens"], "kind": kind, "microseconds": round(entry["microseconds"]),
             "megabytes": megabytes}
        )  # fmt: skip
    return rows


def main() -> None:
    """Write the second file anew."""
    parser = argparse.ArgumentParser(description="Rows for predict_error.py from the device check's file.")
    parser.add_argument("check", type=Path, help="device.json of plugins/device_check.sh")
    parser.add_argument("rows", type=Path, help="the file to write; rows of other kinds in it stay")
    arguments = parser.parse_args()
    check = json.loads(arguments.check.read_text(encoding="utf-8"))
    known = json.loads(arguments.rows.read_text(encoding="utf-8"))
    cuda = f"{check['cuda'] // 1000}.{check['cuda'] % 1000 // 10}"
    known |= {
        "device": f"{check['device']}, driver {check['driver']}, CUDA {cuda}, torch {check['torch']}",
        "copy_gbs": round(check["copied_gb_per_second"]), "date": check["date"][:10], "commit": check["commit"],
        "linears": linear_rows(check, known["linears"]), "steps": step_rows(check, known["steps"]),
    }  # fmt: skip
    arguments.rows.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
