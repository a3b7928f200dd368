"""Predicted latency: what launches, bytes, tensor cores and instruction issue allow. Never measured on a device."""
