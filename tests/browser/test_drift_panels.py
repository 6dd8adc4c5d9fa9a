"""Drift as an SRE sees it: Evidently's own UI and the page of a check in a real browser.

With EVERGREEN_SCREENSHOTS=DIR the pages are kept as pictures (docs/images).
"""

from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from monitoring import page as pages
from monitoring import workspace as workspaces
from monitoring.verdict import DataTest
from tests.browser_lab import MARKS, browsing, picture, sync_api
from tests.drift_lab import FIRST, MODEL, outcome, pairs, verdict, write_check
from tests.evidently_lab import serve

pytestmark = MARKS
HOUR = timedelta(hours=1)
HOSTILE = "</script><script>window.planted=1</script><img src=x onerror='window.planted=1'>"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten checks, one every three hours: calm, a drift that ends, hours without labels, and one empty window."""
    root = tmp_path_factory.mktemp("panels")
    checks = root / "monitoring" / "checks"
    for i in range(10):
        shift = {4: 0.4, 5: 0.8, 6: 0.9, 7: 0.6}.get(i, 0.0)
        drawn, as_of = pairs(shift, rows=4000, seed=i), FIRST + HOUR * 3 * i
        changed = {"outcome": None} if i % 4 == 2 else {"outcome": outcome(0.30 + i / 400)}
        if i == 8:
            drawn, changed = [], {"columns": (), "reason": "No requests in the window", "rows": (9, 0), "serving": None}
        out = write_check(checks, as_of, drawn, **changed)
    workspaces.record(root / "evidently", MODEL, out)
    return root


@pytest.fixture(scope="module")
def page() -> Iterator["sync_api.Page"]:
    with browsing(height=900, patience_s=30) as page:
        yield page


def show_project(page: "sync_api.Page", base: str) -> None:
    page.goto(f"{base}/projects/{workspaces.project_id_of(MODEL)}")
    page.locator("[class*=MuiMarkElement]").first.wait_for()


def test_panels_show_and_a_run_opens_by_a_click_and_torn_files_heal(page, home):
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    with serve(home / "evidently") as client:
        base = str(client.base_url).rstrip("/")
        show_project(page, base)
        for title in ("Kind of drift", "Share of drifted features", "HIT@3 on matured labels", "Latency", "Volumes"):
            page.get_by_text(title).first.wait_for()
        assert page.locator("[class*=MuiBarElement]").count() >= 4
        picture(page, "drift-1-panels", full_page=True)

        page.locator("a, button").filter(has_text="Reports").first.click()
        page.get_by_text("model:7").first.wait_for()
        row = page.get_by_role("row").filter(has_text="kind:population").first
        row.get_by_role("link", name="View").click()
        page.get_by_text("Columns, the furthest above its threshold first").wait_for()
        assert "spend" in page.inner_text("body")
        assert "monitoring/checks/2026030" in page.inner_text("body")
        picture(page, "drift-2-run")

        snapshots = home / "evidently" / str(workspaces.project_id_of(MODEL)) / "snapshots"
        victim = sorted(snapshots.glob("*.json"))[3]
        victim.write_text(victim.read_text()[:300])  # the running UI holds the old one; a restart would not come up
        assert len(workspaces.repair(home / "evidently")) == 1
        last = sorted((home / "monitoring" / "checks").iterdir())[-1]
        workspaces.record(home / "evidently", MODEL, last)
        assert victim.exists()
        page.wait_for_timeout(1000)
        show_project(page, base)
    assert errors == []


def test_the_page_of_a_check_says_what_is_wrong_at_first_sight(page, home, tmp_path):
    drawn = pairs(0.8, rows=4000)
    broken = {"age_years": "62 % missing, 1 % before; the other columns of its feed are whole"}
    failed = DataTest("missing: age_years", False, 0.62, "< 0.2", "62 % of age_years is missing, 20 % at most may be")
    found = replace(verdict(drawn), broken=broken, kind="broken", outcome=outcome(0.21, lost=True), data=(failed,))
    found = replace(
        found, reason="Broken data: age_years is missing. Quality is lost: HIT@3/save 0.210, expected 0.310"
    )
    pages.save(found, drawn, tmp_path)
    page.goto((tmp_path / "drift.html").as_uri())
    page.locator(".js-plotly-plot").first.wait_for()
    tiles = page.locator(".tile.wrong")
    assert tiles.count() == 4
    screen = page.viewport_size["height"]
    for said in (page.locator("h1"), tiles.last, page.get_by_text("62 % of age_years is missing").first):
        assert said.bounding_box()["y"] + said.bounding_box()["height"] < screen  # without a scroll
    picture(page, "drift-3-page")


def test_a_category_that_holds_a_script_stays_text_in_page_and_ui(page, tmp_path):
    drawn = [replace(p, names={3: HOSTILE, 7: "de", 11: "fr"}) for p in pairs(0.8, rows=4000)]
    columns = tuple(replace(c, note=HOSTILE) for c in verdict(drawn).columns)
    changed = {"columns": columns, "reason": f"drifted: {HOSTILE}", "skipped": {"x": HOSTILE}, "evidence": (HOSTILE,)}
    out = write_check(tmp_path / "checks", FIRST, drawn, **changed)
    page.goto((out / "drift.html").as_uri())
    page.locator(".js-plotly-plot").first.wait_for()
    assert page.evaluate("window.planted") is None
    assert page.locator("img[src=x]").count() == 0
    recorded = workspaces.record(tmp_path / "evidently", MODEL, out)
    with serve(tmp_path / "evidently") as client:
        base = str(client.base_url).rstrip("/")
        page.goto(f"{base}/projects/{recorded.project_id}/reports/{recorded.run_id}")
        page.locator(".js-plotly-plot").first.wait_for()
        assert page.evaluate("window.planted") is None
        assert page.locator("img[src=x]").count() == 0
