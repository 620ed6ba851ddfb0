"""The page in a real browser: a chat streams, the machine room shows what the server does."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator

import httpx
import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, sync_playwright

from server.running import PROMPT, Running

_BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, _BROWSERS)), None)
    if found is None:
        pytest.skip("no Chromium is installed (apt-get install chromium, or set CHROMIUM): the page is not tested")
    with sync_playwright() as started:
        opened = started.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


@pytest.fixture
def page(browser: Browser, running: Running) -> Iterator[Page]:
    """The page, opened; nothing in it may fail, and nothing be asked of another host."""
    opened = browser.new_page(viewport={"width": 1200, "height": 800})
    failures: list[str] = []
    opened.on("pageerror", lambda error: failures.append(str(error)))
    opened.on("console", lambda message: failures.append(message.text) if _is_failure(message) else None)
    opened.on("request", lambda request: None if request.url.startswith(running.url) else failures.append(request.url))
    opened.goto(running.url)
    yield opened
    opened.close()
    assert failures == []


def _is_failure(message: ConsoleMessage) -> bool:
    return message.type == "error" and "status of 400" not in message.text  # the browser tells of every refusal


def test_a_chat_streams_and_the_room_shows_it(page: Page, http: httpx.Client) -> None:
    http.post("/admin/flush", headers={"Authorization": "Bearer boss"})
    page.locator("#status").filter(has_text="ready").wait_for()
    page.locator("#resident").filter(has_text=re.compile("^0 of 256")).wait_for()
    before = page.evaluate("document.getElementById('map').toDataURL()")
    page.locator("summary").click()
    page.locator("#max-tokens").fill("200")
    page.locator("#temperature").fill("0")
    page.evaluate(
        """() => { window.seen = new Set();
        new MutationObserver(() => window.seen.add(document.querySelector('.assistant')?.textContent.length))
          .observe(document.getElementById('log'), {subtree: true, childList: true, characterData: true}); }"""
    )
    page.locator("#question").fill(PROMPT)
    page.keyboard.press("Enter")
    page.wait_for_selector(".note", timeout=60_000)
    assert page.locator(".user").inner_text().strip() == PROMPT.strip()
    assert page.evaluate("window.seen.size") > 10  # it came in pieces
    assert "200 tokens (length)" in page.locator(".note").inner_text()
    page.locator("#resident").filter(has_text=re.compile("^[1-9]")).wait_for()
    assert page.evaluate("document.getElementById('map').toDataURL()") != before
    assert "MiB given" in page.locator("#given").inner_text()
    assert page.locator("#split div").count() == 5
    assert page.locator("#hits").inner_text().endswith("%")


def test_an_answer_can_be_stopped_from_the_keyboard(page: Page) -> None:
    assert page.evaluate("document.activeElement.id") == "question"
    page.keyboard.type("hello")
    page.keyboard.press("Enter")
    page.locator(".assistant").filter(has_text=re.compile(".")).wait_for()
    page.keyboard.press("Escape")
    page.wait_for_selector(".note")
    page.locator("#map").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#cell").inner_text().startswith("Layer 0, expert 1: ")


def test_texts_are_text(page: Page) -> None:
    page.locator("summary").click()
    page.locator("#max-tokens").fill("5")
    page.locator("#question").fill("<img src=x onerror=alert(1)>")
    page.keyboard.press("Enter")
    page.wait_for_selector(".note", timeout=60_000)
    assert page.locator("#log img").count() == 0


def test_an_error_is_told(page: Page) -> None:
    page.locator("#question").fill("word " * 2000)
    page.keyboard.press("Enter")
    page.wait_for_selector(".error")
    assert "context" in page.locator(".error").inner_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_can_be_read(page: Page, scheme: str) -> None:
    """Texts differ from their ground by 4.5 to 1 at least (WCAG AA)."""
    page.emulate_media(color_scheme=scheme)
    contrasts = page.evaluate(_CONTRASTS)
    assert contrasts
    assert {name: value for name, value in contrasts.items() if value < 4.5} == {}


_CONTRASTS = """() => {
  const light = (text) => {
    const [r, g, b] = text.match(/[\\d.]+/g).map(Number).map((c) => c / 255)
      .map((c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (element) => {
    for (let one = element; one; one = one.parentElement) {
      const colour = getComputedStyle(one).backgroundColor;
      if (colour !== 'rgba(0, 0, 0, 0)') return colour;
    }
    return 'rgb(255, 255, 255)';
  };
  const found = {};
  for (const element of document.querySelectorAll('h1, h2, p, dt, dd, li, label, button, summary, #status, #model')) {
    if (!element.innerText?.trim() || element.disabled) continue;
    const [a, b] = [light(getComputedStyle(element).color), light(ground(element))].sort((x, y) => y - x);
    found[`${element.tagName}#${element.id} ${element.innerText.slice(0, 20)}`] = (a + 0.05) / (b + 0.05);
  }
  return found;
}"""
