"""The page at /, in a real browser where there is one."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from typing import Any

import pytest
from servers import Running, ScriptedEngine, running
from skips import chromium, missing

WRITTEN = ("<|channel>thought\nHm, <b>.<channel|>", "It is ", "<i>so</i>.")


def test_one_file_that_asks_nobody_else() -> None:
    with running(ScriptedEngine(), api_key="secret", hosts=None) as server, server.http() as client:
        page = client.get("/")
    assert page.is_success and page.headers["content-type"].startswith("text/html")
    assert "connect-src 'self'" in page.headers["content-security-policy"]
    assert not re.search(r"https?://|//\w+\.|@import|<link rel=.stylesheet|<script src", page.text)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if missing("playwright") or chromium() is None:
        pytest.skip("no Chromium that can be driven")
    playwright = importlib.import_module("playwright.sync_api")
    with playwright.sync_playwright() as started:
        found = started.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        yield found
        found.close()


def opened(browser: Any, server: Running) -> tuple[Any, list[str]]:
    """The page, and the addresses that it asked and errors that it met."""
    page, met = browser.new_page(), list[str]()
    page.on("request", lambda request: met.append(request.url))
    page.on("pageerror", lambda error: met.append(str(error)))
    page.goto(server.url + "/")
    return page, met


def test_a_chat_by_keyboard(browser: Any) -> None:
    """Thoughts apart, markup shown as text, the line of statistics, the whole conversation in the next request."""
    with running(ScriptedEngine(WRITTEN)) as server:
        page, met = opened(browser, server)
        page.get_by_label("Message (").fill("Is it?")
        page.keyboard.press("Enter")
        page.get_by_text("3 tokens").wait_for()
        answer = page.locator(".assistant > .text")
        assert answer.inner_text() == "It is <i>so</i>."
        assert page.locator("details .text").text_content() == "Hm, <b>."
        page.keyboard.type("Sure?")
        page.keyboard.press("Enter")
        page.get_by_text("3 tokens").nth(1).wait_for()
        said = server.engine.tokenizer.seen[-1]["messages"]
        assert [message["content"] for message in said] == ["Is it?", "It is <i>so</i>.", "Sure?"]
        assert all(address.startswith(server.url) for address in met), met
        page.get_by_role("button", name="New chat").click()
        assert page.locator(".turn").count() == 0


def test_settings_and_stop(browser: Any) -> None:
    import threading

    with running(ScriptedEngine(("One", "two", "three"), gate=threading.Semaphore(0))) as server:
        page, _ = opened(browser, server)
        page.get_by_text("Settings", exact=True).click()
        page.get_by_label("Temperature").fill("0.5")
        page.get_by_label("Instructions").fill("Be brief.")
        page.get_by_label("Message (").fill("Go")
        page.get_by_role("button", name="Send").click()
        page.get_by_text("One", exact=True).wait_for()
        page.keyboard.press("Escape")
        page.get_by_text("Stopped.").wait_for()
        server.engine.gate.release(10)
        assert server.idle()
        assert server.engine.asked[0].sampling.temperature == 0.5
        assert server.engine.tokenizer.seen[0]["messages"][0] == {"role": "system", "content": "Be brief."}


def test_a_key_that_is_missing(browser: Any) -> None:
    with running(ScriptedEngine(), api_key="secret") as server:
        page, _ = opened(browser, server)
        page.get_by_text("needs its API key").wait_for()
        page.get_by_label("Message (").fill("Go")
        page.keyboard.press("Enter")
        page.get_by_role("alert").wait_for()
        assert page.get_by_label("Message (").input_value() == "Go"  # it can be sent again
        page.get_by_text("Settings", exact=True).click()
        page.get_by_label("API key").fill("secret")
        page.get_by_role("button", name="Send").click()
        page.get_by_text("3 tokens").wait_for()
