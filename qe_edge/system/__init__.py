"""What every room stands on: errors, registries, atomic files, locks, threads, devices; nothing of models."""
