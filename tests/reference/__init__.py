"""Slow, obvious float64 versions of what the product computes fast."""
