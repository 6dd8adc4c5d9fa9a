"""The story of one retrain, from the log to served traffic.

plan ─▶ features ─▶ good data? ─▶ train ─▶ judge ─▶ drift ─▶ register ─▶ promote? ─▶ canary ─▶ champion
                         └─ bad ─────────▶ hold ◀──────────────────────────┘
                                           the champion goes on serving

From bad data nothing is trained or registered: the run is held, with the report of the tests. Training may leave two
contenders, an update and one from scratch; from the gate on there is one, the chosen.
"""

from kfp import dsl

from components.conclude import conclude
from components.drift import check_drift
from components.features import build_features
from components.judge import judge_challenger
from components.plan import make_plan
from components.quality import BAD, check_data
from components.register import register_model
from components.train import train_ranker
from model.config import DEFAULT_STRATEGY
from pipelines.platform import Needs, on_cluster
from pipelines.rollout import rollout


@dsl.pipeline(name="retrain", description="Update the ranker on new engagement; let it in only on evidence.")
def retrain(as_of: str, strategy: str = DEFAULT_STRATEGY, reason: str = "slot", trust_data: bool = False) -> None:
    """Retrain at `as_of` (ISO 8601 with offset), and roll the challenger out if it passes the gate.

    With `trust_data` a person answers for data that is not as usual: it is tested and told of, and does not hold.
    """
    # Who is champion, and which rows are new, is read afresh each time: the one input that arguments do not hold.
    plan = on_cluster(make_plan(as_of=as_of, strategy=strategy, reason=reason), Needs(cache=False))

    features = on_cluster(build_features(plan=plan.output), Needs(cpu="4", memory="16Gi"))
    table = features.outputs["table"]

    # What waits in quarantine is not among the arguments.
    data = on_cluster(check_data(plan=plan.output, table=table, trust=trust_data), Needs(memory="8Gi", cache=False))

    with dsl.If(data.outputs["Output"] == BAD):
        on_cluster(conclude(plan=plan.output, version="", went_live="held"), Needs(cache=False))
    with dsl.Else():
        challenger = on_cluster(
            train_ranker(plan=plan.output, table=table), Needs(cpu="4", memory="16Gi", timeout_s=14400, gpu=1)
        )

        gate = on_cluster(
            judge_challenger(
                plan=plan.output, table=table, bundle=challenger.outputs["bundle"], rival=challenger.outputs["rival"]
            ),
            Needs(cpu="2", memory="8Gi", gpu=1),
        )
        bundle = gate.outputs["chosen"]

        drift = on_cluster(
            check_drift(plan=plan.output, table=table, bundle=bundle, parity=features.outputs["parity"]),
            Needs(cpu="2", memory="8Gi"),
        )

        version = on_cluster(
            register_model(
                plan=plan.output,
                bundle=bundle,
                evidence=gate.outputs["evidence"],
                report=gate.outputs["report"],
                drift=drift.outputs["verdict"],
            ),
            Needs(cache=False, signs=True),
        )
        with dsl.If(gate.outputs["Output"] == "promote"):
            live = rollout(version=version.output, as_of=as_of)
            on_cluster(conclude(plan=plan.output, version=version.output, went_live=live.output), Needs(cache=False))
        with dsl.Else():
            on_cluster(conclude(plan=plan.output, version=version.output, went_live="held"), Needs(cache=False))
