"""Check and time the kernels on a real GPU, through the driver API. DEVICE.md says where that has been done."""
