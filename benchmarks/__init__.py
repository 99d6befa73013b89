"""Ours and the peers, side by side: `python -m benchmarks.run --suite cpu`."""
