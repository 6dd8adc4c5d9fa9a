"""Simulated canaries: the judge beside two others."""
