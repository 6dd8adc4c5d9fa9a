"""Features, ours beside their peers; `python -m benchmarks.features` runs all and writes docs/results/features.md."""
