"""The KServe predictor, the canary and its judge, promotion and rollback."""
