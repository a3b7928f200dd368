"""Number grids, schemes, and exact products of small integers."""
