"""Feast: entities, sources, views, the feature service, the offline store."""
