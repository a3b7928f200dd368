"""All targets by name."""

from __future__ import annotations

from tests.fuzz import artifacts, descriptions, weights

TARGETS = {target.name: target for target in (*weights.TARGETS, *artifacts.TARGETS, *descriptions.TARGETS)}
