"""Which strategies each section compares."""

from model.config import DEFAULT_STRATEGY, STRATEGY_NAMES

REFERENCES = ("frozen", "scratch", "finetune")
STRENGTHS = ("1", "100", "10000")


def known(names: tuple[str, ...]) -> list[str]:
    """The names that are strategies, in the order given, each once."""
    return [n for n in dict.fromkeys(names) if n.partition("@")[0] in STRATEGY_NAMES]


FAMILY = known((*REFERENCES, "l2", "ewc", "distill", "replay", "ewc+distill", "distill+replay", "ewc+distill+replay"))
SHORT = known((*REFERENCES, "replay", "ewc+distill+replay"))
FRONTIER = known(
    (*REFERENCES, "replay", DEFAULT_STRATEGY, *(f"{s}@{strength}" for s in ("l2", "ewc") for strength in STRENGTHS))
)
