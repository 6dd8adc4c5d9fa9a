"""What a person sees: progress while it runs, a short table at the end, one line for an error."""

from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress
from rich.table import Table

from engagement.errors import EvergreenError
from evergreen.settings import LOOPBACK, Settings

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)
if not out.is_terminal:
    out.width = 120  # a file or a CI log; rich would take 80


class Progress:
    """A progress line a step: a live bar on a terminal, a plain line where the output is a file."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet, self.step = quiet, ""
        self.bar: RichProgress | None = None
        self.task: TaskID | None = None

    def __enter__(self) -> "Progress":
        if not self.quiet and err.is_terminal:
            columns = (
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TimeElapsedColumn(),
            )
            self.bar = RichProgress(*columns, console=err, transient=False)
            self.bar.start()
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar:
            self._finish()
            self.bar.stop()

    def __call__(self, step: str, text: str, done: int, total: int) -> None:
        """Show that `step` is at `done` of `total`."""
        if self.quiet:
            return
        label = f"{step:<18} {text}"
        if not self.bar:
            if step != self.step or (text and not total):
                err.print(f"  {escape(label)}")
            self.step = step
            return
        if step != self.step:
            self._finish()
            self.task, self.step = self.bar.add_task(label, total=None), step
        assert self.task is not None
        self.bar.update(self.task, description=escape(label), completed=done, total=total or None)

    def _finish(self) -> None:
        if self.bar and self.task is not None:
            total = self.bar.tasks[-1].total or 1
            self.bar.update(self.task, total=total, completed=total)


def failed(error: EvergreenError) -> None:
    """One line for an error."""
    err.print(f"[bold red]evergreen:[/] {escape(str(error))}", soft_wrap=True)


def imported(report: dict[str, Any]) -> None:
    """What an import did."""
    if not report["imported"] and report["already_present"]:
        out.print(f"Nothing to do: all {report['already_present']:,} engagements are already in the store.")
        _left_out(report)
        return
    out.print(
        f"Imported {report['imported']:,} engagements in {report['requests']:,} requests by {report['users']:,} users "
        f"on {report['items']:,} items ({report['first']:.10} to {report['last']:.10})."
    )
    if report["sampled"]:
        out.print(f"{report['sampled']:,} of the candidates were sampled: only positives were logged.")
    for reason, count in report["quarantined"].items():
        out.print(f"  {count:,} rows went to quarantine: {reason}")
    _left_out(report)


def simulated(report: dict[str, Any]) -> None:
    """What was simulated."""
    out.print(
        f"Wrote {report['impressions']:,} impressions in {report['requests']:,} requests by {report['users']:,} users "
        f"on {report['items']:,} items, {report['days']:,} days of the world {report['world']}, to {report['out']}."
    )


def _left_out(report: dict[str, Any]) -> None:
    if report["forgotten"]:
        out.print(f"  {report['forgotten']:,} rows of forgotten users were left out")
    for file, reason in report["unreadable"].items():
        out.print(f"  [yellow]left out[/]: {escape(file)} cannot be read ({escape(reason)}); deliver it again")


def checked(report: dict[str, Any]) -> None:
    """What a check of the store found."""
    if not report["damaged"]:
        out.print(f"All {report['parts']:,} files are whole ({report['bytes'] / 1e6:,.1f} MB).")
        return
    table = Table(title=f"{len(report['damaged'])} of {report['parts']:,} files are damaged", title_justify="left")
    for name in ("file", "what is wrong", "rows lost", "kept as"):
        table.add_column(name, overflow="fold")
    for d in report["damaged"]:
        table.add_row(escape(d["path"]), d["reason"], f"{d['rows']:,}", escape(d["kept"] or "–"))
    out.print(table)
    out.print("Import the dataset again: exactly the lost rows come back.")


def compacted(report: dict[str, Any]) -> None:
    """What a compaction, and perhaps a retention, did."""
    merged, kept = report["compacted"], report["retained"]
    if merged["merged"]:
        out.print(f"Merged {merged['merged']:,} files of {merged['days']:,} days: {merged['parts_left']:,} are left.")
    else:
        out.print(f"Nothing to merge in {merged['parts']:,} files.")
    if kept:
        out.print(
            f"{kept['days_left_out']:,} days left the store; {kept['snapshots_dropped']:,} recorded snapshots were "
            "dropped (their runs cannot be repeated)."
        )


def forgotten(report: dict[str, Any]) -> None:
    """What was removed of a user, and what saw the user."""
    if not report["known"]:
        out.print(f"The store holds nothing of user {escape(report['user'])}.")
        if not (report["online_rows"] or report["served_answers"] or report["view_files"] or report["run_directories"]):
            return
    table = Table(title=f"Removed of user {escape(report['user'])}", title_justify="left", show_header=False)
    rows = {f"rows of {name}": n for name, n in report["rows"].items()} | {"online rows": report["online_rows"]}
    left = {
        "view files (rebuilt)": report["view_files"],
        "answers in the serving log": report["served_answers"],
        "records in the stream's quarantine": report["quarantined_records"],
        "tables of runs": len(report["run_directories"]),
    }
    for name, count in (rows | left).items():
        table.add_row(name, f"{count:,}")
    out.print(table)
    for s in report["snapshots"]:
        out.print(f"snapshot {s['digest'][:12]} of {s['as_of']:.16} held the user: its run must be planned anew")
    for m in report["models"]:
        trained = f"trained on {m['train_start']:.16} to {m['train_end']:.16}"
        out.print(
            f"model v{m['version']} saw the user ({m['how']}): {trained} {escape(' '.join(m['aliases']))}".rstrip()
        )
    for path in report["samples"]:
        out.print(f"the sample in {escape(path)} still shows the user: it goes with the version")


def interval(metric: dict[str, Any] | None, action: str) -> str:
    """`0.123 [0.10, 0.14]`, or a dash for a model that there is not."""
    if not metric or metric["hit3"][action] is None:
        return "–"
    value = f"{metric['hit3'][action]:.3f}"
    bounds = metric.get("interval", {}).get(action)
    return f"{value} \\[{bounds[0]:.3f}, {bounds[1]:.3f}]" if bounds else value


def retrained(results: list[dict[str, Any]], settings: Settings) -> None:
    """The table at the end of a retrain."""
    for r in results:
        if r["repeated"]:
            out.print(f"Nothing to do for {r['as_of']:.16}: run {r['run_key']} has finished.")
    primary = results[-1]["gate"]["primary_action"]
    table = Table(title=f"HIT@3/{primary} on the same later requests", title_justify="left", show_lines=True)
    for name in ("slot", "champion", "challenger", "gate", "canary", "serves now"):
        table.add_column(name, overflow="fold")
    for r in results:
        gate, steps = r["gate"], (r["rollout"] or {"steps": []})["steps"]
        before, version = version_of(r["champion"]), version_of(r["version"])
        serves = version if r["outcome"] == "champion" else before
        table.add_row(
            f"{r['as_of']:.16}\n{gate['requests']} requests",
            f"{before}\n{interval(gate['metrics']['champion'], primary)}",
            "\n".join([version, interval(gate["metrics"]["challenger"], primary), *_rival(r, primary)]),
            "\n".join(_verdict(g, bool(gate.get("rival"))) for g in (gate, gate.get("rival")) if g),
            " → ".join(f"{_stage(s)} {'ok' if s['verdict'] == 'pass' else s['verdict']}" for s in steps) or "–",
            f"[bold]{serves}[/]",
        )
    out.print(table)
    for r in results:
        if not r["version"]:
            out.print(f"Nothing was trained at {r['as_of']:.16}, the data is bad: {escape(r['data']['report'])}")
    look_further(settings)


def version_of(name: str) -> str:
    """`v7`, or a dash where there is none."""
    return f"v{name}" if name else "–"


def _stage(step: dict[str, Any]) -> str:
    return f"{step['percent']} %" if step["percent"] else "dark"


def _p99(step: dict[str, Any]) -> str:
    """The challenger's, beside the champion's where there is one."""
    found = [step["p99_ms"][who] for who in ("challenger", "champion")]
    return " against ".join(f"{value:.1f}" for value in found if value is not None) or "–"


def _verdict(gate: dict[str, Any], of_two: bool) -> str:
    who = f"{gate['chosen']}: " if of_two else ""
    return (
        f"{who}[{'green' if gate['verdict'] == 'promote' else 'yellow'}]{gate['verdict']}[/]: {escape(gate['reason'])}"
    )


def _rival(result: dict[str, Any], primary: str) -> list[str]:
    """Lines that tell of a second contender; none where there was one alone."""
    gate, why = result["gate"], result.get("also_scratch")
    if not why or not result["version"]:
        return []
    failed = result["not_chosen"].get("failed")
    if failed:
        return [f"{gate['chosen']} ({why})", f"update failed: {escape(failed)}"]
    rival = gate["rival"]
    return [f"{gate['chosen']} ({why})", f"not {rival['chosen']}: {interval(rival['metrics']['challenger'], primary)}"]


def look_further(settings: Settings) -> None:
    """The commands that show more."""
    out.print("Look further:")
    for command, what in (
        ("evergreen up", f"MLflow UI, Evidently UI and the serving gateway on {LOOPBACK}"),
        ("evergreen status", "champion, traffic, drift, next slot"),
        ("evergreen replay --from T0 --to T1", "the same, slot after slot, over history"),
    ):
        out.print(f"  .venv/bin/{command:<36} {what}")


def replayed(result: dict[str, Any]) -> None:
    """One line a strategy."""
    primary, tests = result["primary_action"], result["windows"][1:]
    requests = sum(w["comparable_requests"] for w in tests)
    out.print(
        f"Replay of {result['dataset']}: HIT@3/{primary} over {requests:,} requests in {len(tests)} windows, "
        f"{len(result['seeds'])} seed(s); a random order has {_number(result['random_hit3'][primary])}."
    )
    table = Table(padding=(0, 0, 0, 1), pad_edge=False)
    names = ("strategy", "HIT@3", "vs finetune", "vs scratch", "gap closed", "forgets", "CPU s", "cost", "gate +/-")
    for name in names:
        table.add_column(name, justify="left" if name == "strategy" else "right")
    for strategy, s in result["strategies"].items():
        gap, cost, gate = s["gap_closed"], s["cost"], s["gate"]
        closed = "–" if gap is None else gap["why_none"] or _estimate(gap["share"], "{:.0%}")
        ratio = cost["cpu_seconds_to_scratch"]
        table.add_row(
            strategy,
            _estimate(s["hit3"][primary], "{:.3f}"),
            *(_estimate(s["against"].get(other), "{:+.1%}") for other in ("finetune", "scratch")),
            closed,
            _number(s["forgetting"] and s["forgetting"]["value"]),
            f"{cost['cpu_seconds']:.1f}",
            f"1/{1 / ratio:.1f}" if ratio else "–",
            f"{gate['promote']}/{gate['hold']}",
        )
    out.print(table)
    if result["exposure"] == "positives":
        out.print("Only positives were logged: candidates were completed by sampling, so HIT@3 is not that of a feed.")


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _estimate(estimate: dict[str, float] | None, form: str) -> str:
    """A value with its interval."""
    if estimate is None:
        return "–"
    value, low, high = (form.format(v) if v is not None else "?" for v in estimate.values())
    return f"{value} [{low}, {high}]"


def promoted(record: dict[str, Any]) -> None:
    """How a rollout ended."""
    for s in record["steps"]:
        seen = f"{s['requests']} requests, {s['pairs']} put to both, {s['errors']} errors"
        out.print(f"  {_stage(s):>5}  {seen}, p99 {_p99(s)} ms: {s['verdict']}")
    colour = "green" if record["outcome"] == "champion" else "red"
    out.print(f"[{colour}]{record['outcome'].replace('_', ' ')}[/]: {escape(record['reason'])}")


def rolled_back(result: dict[str, Any]) -> None:
    """Who serves after a rollback."""
    if result["challenger"]:
        out.print(f"v{result['challenger']} is taken back; v{result['champion']} serves everybody.")
    else:
        out.print(f"Champion is v{result['champion']} again (was v{result['was']}).")


def refreshed(result: dict[str, Any]) -> None:
    """What is served now, and whether it is what training reads."""
    out.print(f"serving features as of {result['online_as_of']:.16} UTC")
    parity = result["parity"]
    if parity is None:
        out.print("no requests yet to compare with the training path")
        return
    differing = sum(s["unequal"] for s in parity["skews"])
    out.print(
        f"train/serve parity: {differing:,} of {parity['values']:,} values differ "
        f"({parity['requests']} requests, {parity['candidates']:,} candidates)"
    )
    for s in parity["skews"]:
        out.print(f"  {s['feature']}: {s['unequal']:,} of {s['values']:,} ({', '.join(s['causes'])})")


def started(services: list[dict[str, Any]]) -> None:
    """Addresses of what runs."""
    table = Table.grid(padding=(0, 2))
    for s in services:
        table.add_row(s["name"], s["url"], "already running" if s["already"] else "started", s.get("note", ""))
    out.print(table)
    out.print("Stop them with `evergreen down`.")


def stopped(names: list[str]) -> None:
    """What was stopped."""
    out.print(f"Stopped {', '.join(names)}." if names else "Nothing to stop.")
