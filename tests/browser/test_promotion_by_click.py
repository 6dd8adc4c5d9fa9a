"""A promotion as an engineer does it: an alias set in MLflow's own UI, in a real browser, and the traffic follows.

Everything is real: Chromium, MLflow's server with its webhook, the promoter, Envoy, KServe predictors. With
EVERGREEN_SCREENSHOTS=DIR the pages are kept as pictures (docs/images).
"""

import json
import time
from collections.abc import Iterator

import pytest

from tests.browser_lab import MARKS, browsing, picture, sync_api
from tests.commands import evergreen, evergreen_json
from tests.serving_lab import Feed, feed_home, left_over, write_bundle

pytestmark = MARKS
PATIENCE = 120.0  # seconds for a whole rollout on a busy machine


@pytest.fixture(scope="module")
def feed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Feed]:
    """A home that serves version 1, with a good version 2 and a version 3 that yields NaN for one popular item."""
    from serving.registry import Registry

    root = tmp_path_factory.mktemp("browser")
    feed = feed_home(root)
    registry = Registry(feed.settings)
    popular = max(set(feed.table.item_id.tolist()), key=feed.table.item_id.tolist().count).decode()
    for seed, poisoned in ((1, ""), (2, ""), (3, popular)):
        bundle = write_bundle(root / f"bundle{seed}", feed.table, seed=seed, poisoned_item=poisoned)
        instant = feed.as_of.isoformat()
        tags = {"gate": "promote", "gate.not_worse": "pass: for the test", "as_of": instant, "train_end": instant}
        registry.register(bundle, f"run-{seed}", tags=tags)
    registry.promote("1")
    evergreen(feed.settings.root, "up", **ports(feed))
    yield feed
    evergreen(feed.settings.root, "down", **ports(feed))
    assert left_over(feed.settings.root) == []


def ports(feed: Feed) -> dict[str, str]:
    return {f"EVERGREEN_{n.upper()}": str(p) for n, p in feed.settings.model_dump().items() if n.endswith("_port")}


@pytest.fixture(scope="module")
def page(feed: Feed) -> Iterator["sync_api.Page"]:
    with browsing() as page:
        yield page


def open_version(page: "sync_api.Page", feed: Feed, version: str) -> None:
    url = f"http://127.0.0.1:{feed.settings.mlflow_port}/#/models/{feed.settings.model_name}"
    page.goto("about:blank")  # the address after `#` alone would not load the page afresh
    page.goto(f"{url}/versions/{version}" if version else url)
    page.get_by_text("Version" if version else "Registered Models").first.wait_for()
    assistant = page.locator("[data-component-id='mlflow.assistant.chat_panel.close']")
    if assistant.count():
        assistant.click()


def set_alias(page: "sync_api.Page", feed: Feed, version: str, alias: str) -> None:
    open_version(page, feed, version)
    page.locator("[data-component-id*='modelversionviewaliaseditor']").first.click()
    dialog = page.get_by_role("dialog").last
    dialog.get_by_role("combobox").fill(alias)
    dialog.get_by_role("combobox").press("Enter")
    dialog.get_by_role("button", name="Save aliases").click()
    dialog.wait_for(state="hidden")


def shares_until(feed: Feed, version: str, outcome: str) -> list[int]:
    """The challenger's shares as they were seen, until the version's rollout ended so."""
    seen: list[int] = []
    deadline = time.monotonic() + PATIENCE
    record = feed.settings.serving / "rollouts" / f"{version}.json"
    routing = feed.settings.serving / "gateway" / "routing.json"
    while time.monotonic() < deadline:
        split = json.loads(routing.read_text())["routing"]
        if split["challenger"] and split["challenger"]["version"] == version and split["percent"] not in seen[-1:]:
            seen.append(split["percent"])
        if record.exists() and json.loads(record.read_text())["outcome"] == outcome:
            return seen
        time.sleep(0.02)
    raise AssertionError(f"version {version} was not {outcome} within {PATIENCE:.0f} s; shares seen: {seen}")


def wait_for_aliases(feed: Feed, wanted: dict[str, str]) -> None:
    from serving.registry import Registry

    deadline = time.monotonic() + 30
    while (found := Registry(feed.settings).aliases()) != wanted:
        assert time.monotonic() < deadline, f"aliases are {found}, wanted {wanted}"
        time.sleep(0.2)


def test_an_alias_set_in_the_browser_rolls_the_version_out_to_champion(page, feed):
    set_alias(page, feed, "2", "candidate")
    picture(page, "promote-1-candidate")
    shares = shares_until(feed, "2", "champion")
    assert shares == sorted(shares) and shares[-1] == 100, shares
    wait_for_aliases(feed, {"champion": "2", "previous": "1"})
    open_version(page, feed, "2")
    page.get_by_text("promoted: ").first.scroll_into_view_if_needed()
    picture(page, "promote-2-champion")
    assert evergreen_json(feed.settings.root, "status", **ports(feed))["serving"]["champion"] == "2"


def test_a_harmful_version_comes_back_and_says_why_in_the_browser(page, feed):
    set_alias(page, feed, "3", "candidate")
    shares = shares_until(feed, "3", "rolled_back")
    assert max(shares, default=0) < 100
    wait_for_aliases(feed, {"champion": "2", "previous": "1"})
    open_version(page, feed, "3")
    page.get_by_text("rolled back: ").first.scroll_into_view_if_needed()
    assert "non-finite" in page.inner_text("body")
    picture(page, "promote-3-rolled-back")


def test_the_ledger_is_read_in_the_browser(page, feed):
    import mlflow

    client = mlflow.MlflowClient(f"http://127.0.0.1:{feed.settings.mlflow_port}")
    experiment = client.get_experiment_by_name("promotions")
    page.goto("about:blank")
    page.goto(f"http://127.0.0.1:{feed.settings.mlflow_port}/#/experiments/{experiment.experiment_id}/runs")
    for decision in ("v2 promoted", "v3 rolled back"):
        page.get_by_text(decision).first.wait_for()
    picture(page, "promote-4-ledger")
