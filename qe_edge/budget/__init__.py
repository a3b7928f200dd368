"""Bits: what a budget is, what layers cost, and how it is spent over them."""
