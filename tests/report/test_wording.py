"""How numbers are written."""
# ruff: noqa: RUF001 - typographic characters are what is tested

from __future__ import annotations

import pytest

from qe_edge.report.wording import listing, percent, points, significant, size


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"), (0, "0"), (0.000182, "0.000182"), (3.87e-6, "3.87 × 10⁻⁶"), (1492.3, "1492"), (12.5, "12.5"),
        (-0.5, "-0.500"), (9.99e-5, "9.99 × 10⁻⁵"), (9.996e-6, "1.00 × 10⁻⁵"), (0.09999, "0.100"), (99.96, "100"),
    ],
)  # fmt: skip
def test_significant_digits(value: float | None, text: str) -> None:
    assert significant(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0, "0 B"), (999, "999 B"), (5372085, "5.37 MB"), (999_999, "1.00 MB"), (4.2e9, "4.20 GB")],
)
def test_sizes(value: float | None, text: str) -> None:
    assert size(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(-0.005, "−0.5 points"), (0.0, "±0.0 points"), (-0.0001, "±0.0 points"), (0.02, "+2.0 points")]
)
def test_differences(value: float, text: str) -> None:
    assert points(value) == text


def test_shares_and_lists() -> None:
    assert percent(None) == "–"
    assert percent(0.9975) == "99.8 %"
    assert [listing(names) for names in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == ["", "a", "a and b", "a, b and c"]
