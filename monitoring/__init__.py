"""Drift and quality monitors and the retrain trigger."""
