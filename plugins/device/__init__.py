"""Check and time the kernels on a real GPU, through the driver API. Has run on one H100; see DEVICE.md."""
