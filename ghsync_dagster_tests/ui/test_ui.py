"""The whole platform as a person meets it: a browser opens the UI, materializes all assets and sees green checks."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import psutil
import pytest
from playwright.sync_api import BrowserContext, Locator, Page, Response, expect, sync_playwright

from ghsync_dagster.defs.batch.columns import OF_USERS
from ghsync_dagster.local import stack
from ghsync_dagster.settings import load_settings
from ghsync_dagster_tests.support.cdc_parts import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.ui

ROOT = Path(__file__).parents[2]
LINES = 2_000
REPOSITORY = "https://github.com/example/ghsync"
CHECKS = {
    "raw_events": ["quarantined_ratio"],
    "users": ["users_valid"],
    "mongo_users": [
        "documents_conform",
        "in_step_with_mysql",
        "no_spark_temp_left",
        "spark_temp_marked",
        "unique_user_id_index",
        "users_complete",
    ],
}
GROUPS = {
    "batch": ["event_files", "raw_events", "quarantined_events", "users"],
    "cdc": ["mysql_users", "users_changes", "dead_letters"],
    "target": ["mongo_users"],
}
CHROMIUM_FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
RUN_STATUS = "query ($run: ID!) { run: pipelineRunOrError(runId: $run) { ... on Run { status } } }"
ENDED = ("SUCCESS", "FAILURE", "CANCELED")
SERVING_SECONDS = 120
RUN_SECONDS = 400
PAGE_SECONDS = 60
END_SECONDS = 30


def sample_lines() -> list[str]:
    """The first lines of the sample."""
    with (ROOT / "data" / "sample_data.json").open(encoding="utf-8") as sample:
        return list(itertools.islice(sample, LINES))


@pytest.fixture(scope="module")
def chromium() -> str:
    """The browser's program."""
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if not found:
        pytest.skip("there is no chromium on PATH: apt-get install chromium")
    return found


@pytest.fixture(scope="module")
def ui(chromium: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Dagster UI with daemon, on homes and an events file of its own."""
    del chromium
    folder = tmp_path_factory.mktemp("ui")
    settings = load_settings(GHSYNC_HOME=folder / "home")
    events = folder / "events.json"
    events.write_text("".join(sample_lines()), encoding="utf-8")
    environment = {
        **os.environ,
        "GHSYNC_HOME": str(settings.home_dir),
        "GHSYNC_EVENTS_PATH": str(events),
        "GHSYNC_GIT_URL": REPOSITORY,
    }
    port = free_port()
    command = [sys.executable, "-m", "ghsync_dagster.cli", "dev", "--port", str(port)]
    with (folder / "dev.log").open("wb") as log:
        server = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        await_serving(server, f"http://127.0.0.1:{port}", folder / "dev.log")
        yield f"http://127.0.0.1:{port}"
    finally:
        end(server, folder)
    assert processes_on(folder) == []


@pytest.fixture
def browser(chromium: str, tmp_path: Path) -> Iterator[BrowserContext]:
    """A browser with a fresh profile."""
    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            tmp_path / "profile", executable_path=chromium, args=CHROMIUM_FLAGS, viewport={"width": 1440, "height": 800}
        )
        context.set_default_timeout(PAGE_SECONDS * 1000)
        expect.set_options(timeout=PAGE_SECONDS * 1000)
        yield context
        context.close()


@pytest.fixture
def screenshots(tmp_path: Path) -> Path:
    """Where screenshots go: TEST_SCREENSHOTS if that is set."""
    folder = Path(os.environ.get("TEST_SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def await_serving(server: subprocess.Popen[bytes], address: str, log: Path) -> None:
    """Wait until the UI answers; it tells nobody when it does."""
    deadline = time.monotonic() + SERVING_SECONDS
    while server.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{address}/server_info", timeout=5) as answer:
                assert answer.status == 200
                return
        except (urllib.error.URLError, TimeoutError):
            time.sleep(0.2)
    raise AssertionError(f"dagster dev does not serve:\n{log.read_text(errors='replace')[-4000:]}")


def end(server: subprocess.Popen[bytes], folder: Path) -> None:
    """End the UI and everything it started: ask first, then kill the group."""
    server.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        server.wait(END_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait(END_SECONDS)
    stack.down(load_settings(GHSYNC_HOME=folder / "home"), progress=lambda _: None)
    deadline = time.monotonic() + END_SECONDS
    while processes_on(folder) and time.monotonic() < deadline:
        time.sleep(0.05)


def processes_on(folder: Path) -> list[str]:
    """Return the command lines of the processes that were started with the folder in them."""
    found = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    return [" ".join(arguments) for arguments in found if any(str(folder) in argument for argument in arguments)]


def open_the_graph(page: Page, ui: str) -> None:
    """See every asset of both halves, in the groups that lead to the collection."""
    page.goto(f"{ui}/asset-groups?expanded={quote(','.join(f'global@global:{group}' for group in GROUPS))}")
    for asset in itertools.chain(*GROUPS.values()):
        expect(page.get_by_text(asset, exact=True).first).to_be_visible()


def materialize_all(page: Page, ui: str) -> str:
    """Materialize every asset of both halves by the button on their lineage; return the run's id."""
    open_the_graph(page, ui)
    with page.expect_response(is_launch) as launch:
        page.get_by_role("button", name="Materialize all (5)").click()
    launched = launch.value.json()["data"]["launchPipelineExecution"]
    assert launched["__typename"] == "LaunchRunSuccess", launched
    return str(launched["run"]["id"])


def is_launch(response: Response) -> bool:
    """Return whether a response answers the launch of a run."""
    asked = json.loads(response.request.post_data or "{}")
    return bool(asked.get("operationName") == "LaunchPipelineExecution")


def await_end(page: Page, ui: str, run_id: str) -> None:
    """Wait for a run's end alongside an empty page: one that shows the run draws all the time, which takes a core."""
    page.goto("about:blank")
    question = {"query": RUN_STATUS, "variables": {"run": run_id}}
    deadline = time.monotonic() + RUN_SECONDS
    while (status := page.request.post(f"{ui}/graphql", data=question).json()["data"]["run"]["status"]) not in ENDED:
        assert time.monotonic() < deadline, status
        time.sleep(0.5)


def see_the_run_succeed(page: Page, ui: str, run_id: str) -> None:
    """Wait for the run's end, and see on its page that all eight checks passed."""
    await_end(page, ui, run_id)
    page.goto(f"{ui}/runs/{run_id}?logs=type%3AASSET_CHECK_EVALUATION")
    ended = page.get_by_text(re.compile(r"^(Success|Failure|Canceled)$")).first
    expect(ended).to_have_text("Success")
    expect(page.get_by_text("8 checks")).to_be_visible()
    for asset, names in CHECKS.items():
        for name in names:
            expect(page.get_by_text(f"Check {name} succeeded for materialization of {asset}.")).to_be_visible()


def see_green_checks(page: Page, ui: str, asset: str, names: list[str]) -> None:
    """See each check of an asset with its green mark on the asset's page."""
    page.goto(f"{ui}/assets/{asset}?view=checks")
    expect(page.get_by_text(f"Checks ({len(names)})")).to_be_visible()
    for name in names:
        # The page keeps a second, hidden copy of each name to measure it by.
        entry = page.locator("div").filter(has_text=re.compile(rf"^({name})+succeeded$", re.IGNORECASE))
        expect(entry.first.get_by_role("img", name="check_circle")).to_be_visible()


def see_the_graph(page: Page, ui: str) -> None:
    """See every asset materialized or observed and in sync, and its checks counted as passed."""
    open_the_graph(page, ui)
    expect(page.get_by_text("6 / 6 Passed")).to_be_visible()
    expect(page.get_by_text("1 / 1 Passed")).to_have_count(2)
    expect(page.get_by_text("Materialized", exact=True)).to_have_count(5)
    expect(page.get_by_text("Observed", exact=True)).to_have_count(1)
    expect(page.get_by_text(re.compile("unsynced|upstream changed|code version", re.IGNORECASE))).to_have_count(0)


def see_the_collection(page: Page, ui: str) -> None:
    """See the collection's count, columns with words, what the load did, the freshness and the code."""
    page.goto(f"{ui}/assets/mongo_users")
    users = len({json.loads(line)["actor"]["id"] for line in sample_lines()})
    expect(page.get_by_text(f"{users:,}", exact=True)).to_be_visible()
    for text in (*OF_USERS.values(), "users_in_files", "inserted", "left_by_reason", "settle"):
        expect(page.get_by_text(text, exact=True).first).to_be_visible()
    expect(page.get_by_text("Fails if more than 7 days since last materialization")).to_be_visible()
    for place in ("blob/main/docs/explain/precedence.md", "tree/main/ghsync_dagster/defs/batch/assets.py#L"):
        expect(page.locator(f"a[href^='{REPOSITORY}/{place}']").first).to_be_visible()


def see_the_preset(page: Page, ui: str) -> None:
    """See a job's launchpad open with its config, complete and without errors."""
    page.goto(f"{ui}/locations/ghsync_dagster.definitions/jobs/users_sample_job/playground")
    for text in ("events_path", "max_quarantined_ratio"):
        expect(page.locator(".CodeMirror-code").get_by_text(text).first).to_be_visible()
    expect(page.locator(".CodeMirror-code").get_by_text("data/sample_data.json")).to_be_visible()
    expect(page.get_by_text("No errors")).to_be_visible()
    expect(page.get_by_role("button", name="Launch Run")).to_be_enabled()


def see_the_plot(page: Page, ui: str) -> Locator:
    """See the plot of events as an image in the asset's metadata, and return it."""
    page.goto(f"{ui}/assets/raw_events")
    page.get_by_text("[Show Markdown]").click()
    plot = page.get_by_role("img", name="Events per minute by type")
    expect(plot).to_be_visible()
    assert plot.evaluate("image => image.complete && image.naturalWidth") == 800
    return plot


def test_a_person_materializes_all_and_sees_every_check_pass(
    ui: str, browser: BrowserContext, screenshots: Path
) -> None:
    page = browser.pages[0]
    # A fresh Dagster greets with a dialog.
    page.add_locator_handler(page.get_by_role("button", name="Skip"), lambda skip: skip.click())
    run_id = materialize_all(page, ui)
    page.set_viewport_size({"width": 1440, "height": 1360})
    see_the_run_succeed(page, ui, run_id)
    page.screenshot(path=screenshots / "checks.png")

    page.set_viewport_size({"width": 1440, "height": 800})
    for asset, names in CHECKS.items():
        see_green_checks(page, ui, asset, names)
    see_the_plot(page, ui).screenshot(path=screenshots / "events_over_time.png")
    see_the_preset(page, ui)
    page.screenshot(path=screenshots / "launchpad.png")
    page.set_viewport_size({"width": 1440, "height": 1920})
    see_the_collection(page, ui)
    page.screenshot(path=screenshots / "mongo_users.png")
    page.set_viewport_size({"width": 1800, "height": 900})
    see_the_graph(page, ui)
    page.screenshot(path=screenshots / "asset_graph.png")
