"""The ranker in plain PyTorch: layers, training, continual learning, metrics, gate."""
