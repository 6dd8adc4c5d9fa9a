"""The ranker beside its peers, measured."""
