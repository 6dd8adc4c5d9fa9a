"""Runs of a pipeline on a laptop leave so much, and no more."""

import json

from pipelines.local import KEPT_RUNS, _forget_old


def test_old_runs_go_with_what_the_cache_says_of_them_and_other_pipelines_stay(tmp_path):
    names = [f"monitor-2026-11-{1 + i // 24:02}-{i % 24:02}-00-00-000000" for i in range(KEPT_RUNS + 2)]
    for name in [*names, "monitor-wide-2026-11-01-00-00-00-000000", "retrain-2026-01-01-00-00-00-000000"]:
        (tmp_path / name / "check-serving").mkdir(parents=True)
    (tmp_path / "logs").mkdir()
    for i in range(KEPT_RUNS + 2):
        (tmp_path / "logs" / f"monitor-202611{1 + i // 24:02}T{i % 24:02}0000000000.log").write_text("told")
    (tmp_path / ".kfp_cache").mkdir()
    for name in (names[0], names[-1]):
        entry = {"table": {"uri": f"{tmp_path}/{name}/build-features/table"}}
        (tmp_path / ".kfp_cache" / f"{name}.json").write_text(json.dumps(entry))
    _forget_old(tmp_path, "monitor")  # the run that begins is the last of those that are kept
    left = sorted(p.name for p in tmp_path.glob("*-0*"))
    assert left == [*names[3:], "monitor-wide-2026-11-01-00-00-00-000000", "retrain-2026-01-01-00-00-00-000000"]
    assert [p.stem for p in (tmp_path / ".kfp_cache").iterdir()] == [names[-1]]
    assert len(list((tmp_path / "logs").iterdir())) == KEPT_RUNS - 1
    _forget_old(tmp_path, "refresh")  # a pipeline that never ran
