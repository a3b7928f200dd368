"""Quantizing a model: plan, checks, walk over its blocks, finished work on disk."""
