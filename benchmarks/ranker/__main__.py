"""`python -m benchmarks.ranker [SECTION ...]`: measure and write docs/results/ranker.md (three hours for all of it)."""

import argparse
from collections.abc import Callable
from functools import partial

from benchmarks import page
from benchmarks.ranker import fisher, quality, scale, speed, study, transact
from benchmarks.ranker.data import cache, table_path, tables

HEAD = """# The ranker beside its peers

`python -m benchmarks.ranker`. Everything that was chosen was chosen on windows before the test windows.
"""


def headed(title: str, section: Callable[[], str]) -> str:
    return f"### {title}\n\n{section()}"


def scaled() -> str:
    tables("movielens")
    return scale.run(table_path("movielens"), cache() / "scale.jsonl")


SECTIONS: dict[str, tuple[str, Callable[[], str]]] = {
    "quality_movielens": ("Quality, MovieLens 100K", partial(quality.run, "movielens")),
    "quality_kuairand": ("Quality, KuaiRand", partial(quality.run, "kuairand")),
    "interactions": ("Feature interactions, MovieLens 100K", partial(study.run, "interactions", window="test")),
    "ladder": ("Ablation ladder, MovieLens 100K", partial(study.run, "ladder", window="test")),
    "speed": ("Speed beside FuxiCTR", speed.run),
    "transact": ("Speed beside the reference TransAct", transact.run),
    "fisher": ("The Fisher beside a loop", fisher.run),
    "scale": ("Scale", scaled),
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("sections", nargs="*", help=f"{', '.join(SECTIONS)}; all by default")
    given = parser.parse_args()
    page.write("ranker.md", HEAD, {n: partial(headed, *s) for n, s in SECTIONS.items()}, given.sections)
