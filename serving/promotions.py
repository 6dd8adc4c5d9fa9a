"""The ledger's decisions, readable in MLflow: one run each in the experiment `promotions`.

The ledger is the truth; runs are made from it afterwards, each once: a tag holds the digest of its entry. What a crash
or an absent MLflow left out is made at the next call.
"""

from typing import TYPE_CHECKING, Any

from evergreen.settings import Settings
from serving.files import read_json
from serving.registry import GATE, Registry

if TYPE_CHECKING:
    from mlflow import MlflowClient

EXPERIMENT = "promotions"
ENTRY = "ledger_entry"  # tag: digest of the ledger's entry


class Promotions:
    """The runs of one home's decisions.

    Args:
        settings: The home.
        registry: Its registry, whose ledger is published.
    """

    def __init__(self, settings: Settings, registry: Registry) -> None:
        self._settings = settings
        self._registry = registry
        self._published: set[str] | None = None  # digests; None: not looked up yet

    def publish(self) -> int:
        """Make the runs that are missing, oldest first; returns how many.

        Raises:
            EvergreenError: MLflow cannot be reached.
        """
        decisions = self._registry.agreement.decisions()
        known = self._published
        if not decisions or (known is not None and all(d["digest"] in known for d in decisions)):
            return 0
        with self._registry.client() as client:
            experiment = self._registry.experiment(client, EXPERIMENT)
            runs = {r.data.tags.get(ENTRY, ""): r.info for r in _all_runs(client, experiment)}
            missing = [d for d in decisions if d["digest"] not in runs or runs[d["digest"]].status != "FINISHED"]
            for decision in missing:
                begun = runs.get(decision["digest"])
                run = begun.run_id if begun else self._begin(client, experiment, decision)
                client.log_dict(run, self._evidence(decision), "evidence.json")
                client.set_terminated(run, "FINISHED")
        self._published = {d["digest"] for d in decisions}
        return len(missing)

    def _begin(self, client: "MlflowClient", experiment: str, decision: dict[str, Any]) -> str:
        told = ("decision", "version", "champion", "previous", "was", "by", "at", "why", "wish")
        tags = {key: str(decision.get(key, ""))[:5000] for key in told}
        name = f"v{decision['version']} {decision['decision']}"
        text = f"**{name}** by {tags['by']}, {tags['at'][:19]} UTC: {tags['why']}"
        tags |= {ENTRY: decision["digest"], "mlflow.note.content": text}
        run_id: str = client.create_run(experiment, tags=tags, run_name=name).info.run_id
        return run_id

    def _evidence(self, decision: dict[str, Any]) -> dict[str, Any]:
        """The entry, what the gate found about its version, and its rollout where there was one."""
        tags = next((v.tags for v in self._registry.versions() if v.version == decision["version"]), {})
        record = read_json(self._settings.serving / "rollouts" / f"{decision['version']}.json")
        ran = decision["decision"] in ("promoted", "rolled back")
        return {
            "entry": decision,
            "gate": {key: tags[key] for key in sorted(tags) if key.startswith(GATE)},
            "rollout": record if ran else None,
        }


def _all_runs(client: "MlflowClient", experiment: str) -> list[Any]:
    found: list[Any] = []
    token = None
    while True:
        page = client.search_runs([experiment], max_results=1000, page_token=token)
        found += page
        token = page.token
        if not token:
            return found
