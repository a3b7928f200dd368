"""Fuzzes everything that reads files of strangers: `python -m tests.fuzz --minutes 120 --seed 7`.

Every case changes one file of a sound folder and reads it as a command does. It must be refused by an error that says
what is wrong, or be harmless. Failures of one kind are shown once, with a line that repeats them, and their files are
kept in the corpus folder.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # a forked process must not miss threads
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import matplotlib.pyplot
import onnx
import onnx_ir
import torch
import yaml
from transformers.utils import logging

from tests.fuzz.target import Target
from tests.fuzz.targets import TARGETS
from tests.fuzz.worker import ACCEPTED, Outcome, run_case

__all__ = ["matplotlib", "onnx", "onnx_ir", "yaml"]  # imported once here, not in every case


@dataclass
class Campaign:
    """A run: sound folders, seconds spent on every target, and what failed, by its key."""

    root: Path
    kept: Path
    corpus: Path
    seed: int
    sound: dict[str, Path] = field(default_factory=dict)
    expected: dict[str, str] = field(default_factory=dict)
    spent: dict[str, float] = field(default_factory=dict)
    cases: Counter[str] = field(default_factory=Counter)
    verdicts: Counter[str] = field(default_factory=Counter)
    failures: dict[str, list[str]] = field(default_factory=dict)

    def prepare(self, target: Target) -> None:
        """Write a target's sound folder, and those that it needs; they must be accepted."""
        if target.name in self.sound:
            return
        if target.after:
            self.prepare(TARGETS[target.after])
        folder = self.kept / target.name
        if not folder.exists():
            folder.mkdir(parents=True)
            target.prepare(folder, self.sound)
        self.sound[target.name] = folder
        outcome = run_case(target, folder, self.root / "case", self.seed, -1, None)
        self._clean()
        if outcome.verdict != ACCEPTED:
            raise SystemExit(f"The sound files of {target.name} are not accepted: {outcome}")
        self.expected[target.name] = outcome.message
        self.spent[target.name] = 0.0

    def run(self, target: Target, case: int) -> Outcome:
        """One case; a failure of a new kind is shown and kept."""
        begun = time.monotonic()
        work = self.root / "case"
        outcome = run_case(target, self.sound[target.name], work, self.seed, case, self.expected[target.name])
        self.spent[target.name] += time.monotonic() - begun
        self.cases[target.name] += 1
        self.verdicts[f"{target.name} {outcome.verdict}"] += 1
        if outcome.failed:
            line = f"python -m tests.fuzz --targets {target.name} --seed {self.seed} --case {case}"
            if outcome.key not in self.failures:
                self._keep(outcome, line, work, f"{target.name}-{self.seed}-{case}")
            self.failures.setdefault(outcome.key, []).append(line)
        self._clean()
        return outcome

    def _keep(self, outcome: Outcome, line: str, work: Path, name: str) -> None:
        print(f"FAILED {outcome.key}\n  {outcome.change}: {outcome.message[:300]}\n  {line}", flush=True)
        self.corpus.mkdir(parents=True, exist_ok=True)
        log = work.with_name(f"{work.name}.log")
        said = log.read_text(encoding="utf-8", errors="replace")[-8000:] if log.exists() else ""
        record = {**asdict(outcome), "repeat": line, "log": said}
        (self.corpus / f"{name}.json").write_text(json.dumps(record, indent=2), encoding="utf-8")

    def _clean(self) -> None:
        for path in self.root.glob("case*"):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
        (self.root / "outside").unlink(missing_ok=True)

    def by_target(self) -> dict[str, list[str]]:
        """What failed of every target that ran."""
        found: dict[str, list[str]] = {name: [] for name in self.expected}
        for key, lines in self.failures.items():
            for line in lines:
                found[line.split()[4]].append(f"{key}: {line}")
        return found

    def summary(self) -> str:
        """Counts by target, and every kind of failure with the line that repeats it."""
        lines = [f"{self.cases.total()} cases of seed {self.seed}, {len(self.failures)} kinds of failures"]
        for name in self.expected:
            counts = {key.partition(" ")[2]: n for key, n in self.verdicts.items() if key.partition(" ")[0] == name}
            lines.append(f"  {name:16} {self.spent[name]:6.0f} s  {counts}")
        for key, found in sorted(self.failures.items(), key=lambda item: -len(item[1])):
            lines.append(f"{len(found):5} x {key}\n        {found[0]}")
        return "\n".join(lines)


def main() -> int:
    """Run the fuzzer; exit code 1 if something failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--targets", default=",".join(TARGETS), help="names with commas between them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, help="run this long, every target as long as the others")
    parser.add_argument("--cases", type=int, default=20, help="without --minutes: cases of every target")
    parser.add_argument("--case", type=int, help="one case only")
    parser.add_argument("--corpus", type=Path, default=Path("fuzz-corpus"), help="folder for what failed")
    parser.add_argument("--sound", type=Path, help="folder of sound files: used if they are there, else written")
    parser.add_argument("--json", type=Path, help="file for the kinds of failures by target")
    options = parser.parse_args()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    chosen = [TARGETS[name] for name in options.targets.split(",")]
    with tempfile.TemporaryDirectory(prefix="qe-fuzz-") as root:
        campaign = Campaign(Path(root), options.sound or Path(root) / "sound", options.corpus, options.seed)
        for target in chosen:
            campaign.prepare(target)
        try:
            _run(campaign, chosen, options)
        except KeyboardInterrupt:
            print("Stopped.")
        print(campaign.summary())
        if options.json is not None:
            options.json.write_text(json.dumps(campaign.by_target()), encoding="utf-8")
    return 1 if campaign.failures else 0


def _run(campaign: Campaign, chosen: list[Target], options: argparse.Namespace) -> None:
    if options.case is not None:
        for target in chosen:
            print(json.dumps(asdict(campaign.run(target, options.case)), indent=2))
    elif options.minutes is None:
        for target in chosen:
            for case in range(options.cases):
                campaign.run(target, case)
    else:
        end, told = time.monotonic() + 60 * options.minutes, time.monotonic()
        while time.monotonic() < end:
            target = min(chosen, key=lambda target: campaign.spent[target.name])
            campaign.run(target, campaign.cases[target.name])
            if time.monotonic() > told + 300:
                told = time.monotonic()
                print(campaign.summary(), flush=True)


if __name__ == "__main__":
    sys.exit(main())
