"""A verdict in words and tables, whatever shows it: the page of a check and its report in the Evidently UI."""

import html
from collections.abc import Iterator
from dataclasses import dataclass

from monitoring.verdict import ColumnDrift, DriftVerdict, Outcome

Row = tuple[str, ...]


@dataclass(frozen=True)
class Mark:
    """One thing that is right or wrong: a coloured tile on the page, a test in the UI.

    Attributes:
        name: `Drift`.
        text: `3 of 40 features, population`.
        wrong: Whether it needs a look.
    """

    name: str
    text: str
    wrong: bool


@dataclass(frozen=True)
class Table:
    """A table of strings.

    Attributes:
        title: What it tells.
        head: Names of its columns.
        rows: Its rows; the last cell of each is what is wrong with it, empty where nothing is.
    """

    title: str
    head: Row
    rows: tuple[Row, ...]


def marks(verdict: DriftVerdict) -> list[Mark]:
    """The whole verdict in a line of tiles, in the order in which one would look."""
    features = [c for c in verdict.columns if not c.prediction]
    moved = sum(c.drifted for c in features)
    scores = [c.name for c in verdict.columns if c.prediction and c.drifted]
    text = f"{moved} of {len(features)} features" + (f", {', '.join(scores)}" if scores else "")
    found = [
        Mark("Data", f"{len(verdict.broken)} broken: {', '.join(verdict.broken)}", True)
        if verdict.broken
        else Mark("Data", "no column broken", False),
        Mark("Drift", f"{text} ({verdict.kind})" if verdict.drifted else text, verdict.drifted),
        _quality(verdict),
        _serving(verdict),
        _skew(verdict),
        _tests(verdict),
    ]
    return [m for m in found if m.text]


def wrong(verdict: DriftVerdict) -> list[str]:
    """Every sentence that says what is wrong, the worst first; empty for a check that found nothing."""
    found = [f"{name}: {why}" for name, why in verdict.broken.items()]
    found += [verdict.outcome.reason] if verdict.outcome and verdict.outcome.lost else []
    found += verdict.serving.problems if verdict.serving else ()
    found += [t.text for t in verdict.data if not t.passed]
    return found + [f"{name}: serving reads it otherwise, {why}" for name, why in verdict.skew.items()]


def tables(verdict: DriftVerdict) -> list[Table]:
    """Everything in detail; tables without rows are left out."""
    head = ("column", "tells of", "kind", "score", "usual", "threshold", "score / threshold", "missing before → now")
    found = [
        Table("Broken columns", ("column", "what is wrong"), tuple(verdict.broken.items())),
        Table("Columns, the furthest above its threshold first", (*head, "what moved", ""), _columns(verdict)),
        Table("Where it moved", ("slice", "of the window", "column", "score"), _slices(verdict)),
        Table("Quality on matured labels", _OUTCOME, _outcome(verdict)),
        Table("Serving", ("what", "value", ""), _health(verdict)),
        Table("Tests of the data", ("test", "value", "rule", "", ""), _data(verdict)),
        Table("Values that serving reads otherwise", ("feature", "what differs"), tuple(verdict.skew.items())),
        Table("Not compared", ("column", "why", ""), tuple((n, w, "") for n, w in verdict.skipped.items())),
        Table("The check", ("", "before", "now", ""), _sizes(verdict)),
    ]
    return [t for t in found if t.rows]


_OUTCOME = ("action", "HIT@3", "95 % interval", "predicted", "observed", "predicted / observed", "")


def _quality(verdict: DriftVerdict) -> Mark:
    if not (outcome := verdict.outcome):
        return Mark("Quality", "no label has matured", False)
    action = outcome.primary or next(iter(outcome.hit3), "")  # JSON sorts them by name
    shown = [f"HIT@3/{action} {outcome.hit3[action]:.3f}{_range(outcome, action)}"] if action in outcome.hit3 else []
    shown += [f"expected {outcome.expected:.3f} at {outcome.age_hours:.0f} h"] if outcome.expected is not None else []
    return Mark("Quality", ", ".join(shown) or outcome.reason, outcome.lost)


def _range(outcome: Outcome, action: str) -> str:
    """The 95 % interval, where there is one."""
    return "" if action not in outcome.interval else " [{:.3f}, {:.3f}]".format(*outcome.interval[action])


def _serving(verdict: DriftVerdict) -> Mark:
    if not (serving := verdict.serving):
        return Mark("Serving", "nothing was logged", False)
    slow = f", 99 % in {serving.p99_ms:.0f} ms" if serving.p99_ms is not None else ""
    return Mark("Serving", f"{serving.errors:.2%} errors{slow}", bool(serving.problems))


def _skew(verdict: DriftVerdict) -> Mark:
    text = "" if verdict.skew_share is None else f"{verdict.skew_share:.2%} of the values"
    return Mark("Train/serve skew", text, bool(verdict.skew))


def _tests(verdict: DriftVerdict) -> Mark:
    passed = sum(t.passed for t in verdict.data)
    text = f"{passed} of {len(verdict.data)} passed" if verdict.data else ""
    return Mark("Data tests", text, passed < len(verdict.data))


def _columns(verdict: DriftVerdict) -> tuple[Row, ...]:
    def row(c: ColumnDrift) -> Row:
        numbers = (f"{c.score:.3f}", f"{c.usual:.3f}", f"{c.threshold:.3f}", f"{c.ratio:.2f}")
        missing = f"{c.missing[0]:.1%} → {c.missing[1]:.1%}"
        return (c.name, c.group, c.kind, *numbers, missing, c.note, "drifted" if c.drifted else "")

    return tuple(row(c) for c in verdict.worst)


def _slices(verdict: DriftVerdict) -> tuple[Row, ...]:
    return tuple((s.slice, f"{s.share:.1%}", s.column, f"{s.score:.3f}") for s in verdict.slices)


def _outcome(verdict: DriftVerdict) -> tuple[Row, ...]:
    if not (outcome := verdict.outcome):
        return ()

    def row(action: str) -> Row:
        low, high = outcome.interval.get(action, (float("nan"), float("nan")))
        shares = (outcome.predicted.get(action), outcome.observed.get(action))
        calibration = outcome.calibration.get(action)
        return (
            action,
            f"{outcome.hit3[action]:.4f}",
            f"{low:.4f} – {high:.4f}" if low == low else "–",
            *("–" if s is None else f"{s:.4f}" for s in shares),
            "–" if calibration is None else f"{calibration:.2f}",
            "",
        )

    about = f"{outcome.requests} matured requests, {outcome.immature} not matured and left out"
    age = f"model {outcome.age_hours:.0f} h old"
    expected = "unknown" if outcome.expected is None else f"{outcome.expected:.4f}"
    end = ("expected at this age", expected, "", age, about, "", "lost" if outcome.lost else "")
    return (*(row(a) for a in outcome.hit3), end)


def _health(verdict: DriftVerdict) -> tuple[Row, ...]:
    if not (serving := verdict.serving):
        return ()
    times = {"median latency": serving.p50_ms, "99 % latency": serving.p99_ms}
    rows = [("requests", str(serving.requests), ""), ("errors", f"{serving.errors:.2%}", "")]
    rows += [("shed", f"{serving.shed:.2%}", "")]
    rows += [(f"fallback: {kind}", f"{share:.2%}", "") for kind, share in serving.fallbacks.items()]
    rows += [(name, f"{ms:.1f} ms", "") for name, ms in times.items() if ms is not None]
    return tuple(rows + [("problem", "", problem) for problem in serving.problems])


def _data(verdict: DriftVerdict) -> tuple[Row, ...]:
    ordered = sorted(verdict.data, key=lambda t: t.passed)
    return tuple((t.name, f"{t.value:.4g}", t.limit, t.text, "" if t.passed else "failed") for t in ordered)


def _sizes(verdict: DriftVerdict) -> tuple[Row, ...]:
    def pair(name: str, values: tuple[int, int]) -> Row:
        return (name, f"{values[0]:,}", f"{values[1]:,}", "")

    start, end = (moment.replace("T", " ")[:16] for moment in verdict.window)
    return (
        pair("requests", verdict.requests),
        pair("rows", verdict.rows),
        pair("users", verdict.users),
        ("rows that came late", "", f"{verdict.late:.2%}", ""),
        ("window", "", f"{start} – {end} UTC", ""),
        ("model", "", f"version {verdict.model_version}, trained at slot {verdict.slot}", ""),
        ("reference, code", "", f"{verdict.reference[:16]} {verdict.code}".strip(), ""),
    )


_STYLE = """
body{margin:0;font:15px/1.45 system-ui,sans-serif;color:#1d2430;background:#fff}
.check{max-width:1180px;margin:0 auto;padding:20px 24px}
.check h1{margin:0;padding:14px 18px;border-radius:6px;font-size:21px;background:#e3f4e6;border-left:8px solid #2e8b47}
.check.wrong h1{background:#fde5e3;border-left-color:#c62f24}
.check p{margin:6px 0;color:#4a5464}
.check ul{margin:10px 0;padding-left:22px}
.tiles{display:flex;flex-wrap:wrap;gap:10px;margin:14px 0}
.tile{flex:1 1 150px;padding:8px 12px;border-radius:6px;background:#eef5ef;border-top:4px solid #2e8b47}
.tile.wrong{background:#fde5e3;border-top-color:#c62f24}
.tile b{display:block;font-size:13px;color:#4a5464}
.check table{border-collapse:collapse;width:100%;margin:6px 0 18px;font-size:13.5px}
.check th,.check td{text-align:left;padding:3px 8px;border-bottom:1px solid #e2e6ec;vertical-align:top}
.check tr.wrong td{background:#fde5e3}
.check h2{font-size:16px;margin:18px 0 2px}
"""


def as_html(verdict: DriftVerdict, after: str = "") -> str:
    """The verdict as HTML, complete without a script: banner, tiles, what is wrong, tables.

    Args:
        verdict: What the check found.
        after: One more line at the end, plain text.
    """
    bad = any(m.wrong for m in marks(verdict))
    return "".join(_html(verdict, "wrong" if bad else "right", after))


def _html(verdict: DriftVerdict, whole: str, after: str) -> Iterator[str]:
    as_of = verdict.as_of.replace("T", " ")[:16]
    yield f'<style>{_STYLE}</style><div class="check {whole}"><h1>{html.escape(verdict.reason)}</h1>'
    yield html.escape(f"Drift check of model {verdict.model_version} at {as_of} UTC").join(("<p>", "</p>"))
    yield '<div class="tiles">'
    for mark in marks(verdict):
        tile, state = f"<b>{html.escape(mark.name)}</b>{html.escape(mark.text)}", "wrong" if mark.wrong else "right"
        yield f'<div class="tile {state}">{tile}</div>'
    yield "</div>"
    sentences = [*wrong(verdict), *verdict.evidence]
    yield "<ul>" + "".join(f"<li>{html.escape(s)}</li>" for s in sentences) + "</ul>" if sentences else ""
    for table in tables(verdict):
        yield f"<h2>{html.escape(table.title)}</h2><table><tr>"
        yield "".join(f"<th>{html.escape(name)}</th>" for name in table.head) + "</tr>"
        for row in table.rows:
            cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in row)
            state = "wrong" if _bad(table, row) else "right"
            yield f'<tr class="{state}">{cells}</tr>'
        yield "</table>"
    yield (f"<p>{html.escape(after)}</p>" if after else "") + "</div>"


def _bad(table: Table, row: Row) -> bool:
    return bool(table.head[-1] == "" and row[-1]) or table.title == "Broken columns"
