"""Runs exported models: artifacts only, no torch, no quantization methods."""
