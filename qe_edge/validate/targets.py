"""What was built, and whether it ran here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qe_edge.accounting import file_sizes
from qe_edge.validate.schema import TargetState


def target_states(validated: Path | None, not_run: Sequence[Path]) -> list[TargetState]:
    """Targets by the names of their folders."""
    folders = ([(validated, True)] if validated else []) + [(folder, False) for folder in not_run]
    return [
        TargetState(
            name=folder.resolve().name, size=sum(file.size for file in file_sizes("engines", folder)), validated=ran
        )
        for folder, ran in folders
    ]
