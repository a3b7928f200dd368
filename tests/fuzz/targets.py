"""All targets by name."""

from __future__ import annotations

from tests.fuzz import artifacts, conversions, descriptions, weights

TARGETS = {
    target.name: target
    for target in (*weights.TARGETS, *conversions.TARGETS, *artifacts.TARGETS, *descriptions.TARGETS)
}
