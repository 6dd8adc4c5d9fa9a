"""What the promoter counts, for Prometheus."""

from prometheus_client import Counter

ROUNDS = Counter("evergreen_reconcile_rounds", "Rounds in which the promoter looked")
FAILURES = Counter("evergreen_reconcile_failures", "Rounds that ended in an error and are repeated")
DECISIONS = Counter("evergreen_promotions", "Wishes by how they were answered", ["outcome"])
WEBHOOKS = Counter("evergreen_webhooks", "Deliveries by what was done with them", ["outcome"])
