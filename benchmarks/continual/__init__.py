"""Continual learning measured by replay: public data, simulated worlds, the frontier, the cost of one update."""
