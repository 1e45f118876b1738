"""The page at `/` in a real browser: the Chromium on the path, or the one that CHROMIUM names."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sync_api = pytest.importorskip("playwright.sync_api")
expect = sync_api.expect
CHROMIUM = os.environ.get("CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium on the path: apt-get install chromium, or CHROMIUM=..."
)
QUIET = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync")
TIMEOUT_MS = 60_000.0


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=list(QUIET))
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, smollm2: Any) -> Iterator[Any]:
    """Of a small window; anything on the console, or a request to another host, is a failure."""
    page = browser.new_page(viewport={"width": 1000, "height": 700})
    page.set_default_timeout(TIMEOUT_MS)
    expect.set_options(timeout=TIMEOUT_MS)
    complaints: list[str] = []

    def heard(said: Any) -> None:
        refused = "status of 400" in said.text  # the browser notes it; the page says why
        if said.type in ("error", "warning") and not refused:
            complaints.append(said.text)

    def elsewhere(url: str) -> bool:
        return not url.startswith(smollm2.url)

    page.on("console", heard)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda sent: complaints.append(sent.url) if elsewhere(sent.url) else None)
    page.goto(f"{smollm2.url}/")
    yield page
    page.close()
    assert complaints == []


@pytest.fixture(scope="module")
def context_id(smollm2: Any) -> str:
    text = "The harbour master of Oslo is called Ingrid Vollan. " * 12
    with smollm2.http() as http:
        made = http.post("/v1/contexts", json={"text": text, "wait": True}).json()
    assert made["state"] == "ready"
    return str(made["id"])


def test_a_question_asked_by_keyboard_alone_is_answered_as_by_the_endpoint(
    page: Any, smollm2: Any, context_id: str, tmp_path: Path
) -> None:
    expect(page.locator("#model")).to_contain_text("smollm2")
    expect(page.locator("#contexts li")).to_have_count(1)
    page.keyboard.press("Tab")  # the link that skips what is above the question
    page.keyboard.press("Enter")
    page.locator("#contexts").focus()
    page.keyboard.press("ArrowDown")
    expect(page.locator("[role=option][aria-selected=true]")).to_have_attribute(
        "data-id", context_id
    )
    page.locator("#question").focus()
    page.keyboard.type("Who is the harbour master?")
    page.locator("#most").fill("8")
    page.locator("#question").focus()
    page.keyboard.press("Control+Enter")
    expect(page.locator("#pace")).to_contain_text("tokens/s")
    expect(page.locator("#pace")).to_contain_text("of them cached")
    with smollm2.http() as http:
        body = {
            "model": "smollm2",
            "messages": [{"role": "user", "content": "Who is the harbour master?"}],
            "contexts": [context_id],
            "max_completion_tokens": 8,
            "temperature": 0,
        }
        said = http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]
    assert page.locator("#answer").text_content() == said["content"]
    shot = page.screenshot(path=str(tmp_path / "answered.png"), full_page=True)
    assert len(shot) > 10_000  # an empty one has 3 kB


def test_the_ring_shows_the_shards_that_the_endpoint_tells_of(
    page: Any, smollm2: Any, context_id: str
) -> None:
    with smollm2.http() as http:
        told = http.get(f"/v1/contexts/{context_id}").json()
    page.locator("#contexts li").click()
    expect(page.locator("#ring path")).to_have_count(len(told["shards"]))
    rows = page.locator("#shards tbody tr")
    expect(rows).to_have_count(len(told["shards"]))
    for at, shard in enumerate(told["shards"]):
        cells = rows.nth(at).locator("td").all_text_contents()
        assert cells[0] == str(shard["rank"])
        assert cells[2:5] == [shard["tier"], shard["codec"], str(shard["pages"])]
    page.locator("#contexts li").click()  # again: none is chosen
    expect(page.locator("#shards")).to_be_hidden()


def test_a_running_answer_is_seen_and_stopped(page: Any, smollm2: Any, until: Any) -> None:
    page.locator("#question").fill("Tell a long story.")
    page.locator("#most").fill("1500")
    page.locator("#send").click()
    expect(page.locator("#running li")).to_contain_text("tokens said")
    expect(page.locator("#answer")).not_to_be_empty()
    page.keyboard.press("Escape")
    expect(page.locator("#pace")).to_have_text("stopped")
    until(lambda: smollm2.running() == 0)
    expect(page.locator("#none-running")).to_be_visible()
    expect(page.locator("#send")).to_be_enabled()


def test_what_is_refused_is_said_on_the_page_and_stays_text(page: Any, smollm2: Any) -> None:
    page.locator("#most").fill("4096")
    page.locator("#question").fill("<img src=x onerror=alert(1)> " * 4000)
    page.locator("#send").click()
    expect(page.locator("#trouble")).to_contain_text("tokens")
    assert page.locator("img").count() == 0


def test_a_phone_shows_all_of_it_without_scrolling_sideways(
    browser: Any, smollm2: Any, context_id: str, tmp_path: Path
) -> None:
    for scheme in ("light", "dark"):
        page = browser.new_page(viewport={"width": 390, "height": 844}, color_scheme=scheme)
        page.goto(f"{smollm2.url}/")
        page.locator("#contexts li").click()
        page.screenshot(path=str(tmp_path / f"{scheme}.png"), full_page=True)
        width = page.locator("html").evaluate("element => element.scrollWidth")
        assert width <= 390
        page.close()
