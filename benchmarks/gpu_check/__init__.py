"""The acceptance run of the CUDA path, `python -m benchmarks.gpu_check`: one file a part (docs/gpu.md)."""
