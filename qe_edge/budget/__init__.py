"""Bits: budgets, the cost of layers, and the allocation of a budget to layers."""
