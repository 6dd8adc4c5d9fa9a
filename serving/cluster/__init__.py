"""A rollout on Kubernetes: the data plane is one KServe InferenceService, and every step is one write of it."""
