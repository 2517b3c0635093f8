"""The measured promises. Each module runs alone: `python -m benchmarks.NAME`."""
