"""What one GPU makes of this package, in the fifteen minutes that it is at hand: docs/gpu.md."""
