"""Evergreen keeps a Homefeed ranker fresh: the command line and the settings."""
