"""Readers of public data formats into the engagement contract."""
