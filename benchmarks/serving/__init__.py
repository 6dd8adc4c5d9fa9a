"""The predictor beside its peers: `python -m benchmarks.serving`."""
