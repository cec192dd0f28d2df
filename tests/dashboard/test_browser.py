"""Is the dashboard as good in a real browser as it is on paper?

Needs Playwright and a Chromium (Debian: apt install chromium); skipped where there is none.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from fake_admin import FakeAdmin
from shown import dashboard

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

LAPTOP = {"width": 1280, "height": 800}
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if path is None:
        pytest.skip("no Chromium in PATH (Debian: apt install chromium)")
    with sync_api.sync_playwright() as play:
        found = play.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def fake() -> FakeAdmin:
    return FakeAdmin(64, 2000)


@pytest.fixture
def page(browser: Browser, fake: FakeAdmin) -> Iterator[Page]:
    """The dashboard of a fleet of 64 workers, on a laptop; scripts must not fail."""
    problems: list[str] = []
    with dashboard(fake) as url:
        page = browser.new_page(viewport=LAPTOP)  # type: ignore[arg-type]
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda said: problems.extend([said.text] * (said.type == "error")))
        page.goto(url)
        yield page
        page.close()
    assert [p for p in problems if "net::ERR" not in p and "status of 5" not in p] == []


def test_a_fleet_of_64_fits_a_laptop(page: Page) -> None:
    assert page.locator(".tile").count() == 64
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    tiles = page.locator(".tiles").bounding_box()
    assert tiles is not None
    assert tiles["height"] < LAPTOP["height"]
    cut = "[...document.querySelectorAll('.tile .figure, .tile .load')]"
    assert page.evaluate(f"{cut}.filter(e => e.scrollWidth > e.clientWidth + 1).length") == 0


@pytest.mark.parametrize("width", [420, 800, 1024, 1920])
def test_no_width_makes_the_page_overflow(page: Page, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_what_is_true_changes_by_itself_and_focus_stays(page: Page, fake: FakeAdmin) -> None:
    tile = page.locator(".tile").nth(5)
    tile.focus()
    fake.calm = True
    page.get_by_text("Nothing found.").wait_for()
    assert page.locator(".finding").count() == 0
    assert tile.evaluate("e => e === document.activeElement")


def test_a_worker_is_chosen_by_keyboard_and_let_go_again(page: Page, fake: FakeAdmin) -> None:
    page.locator(".tile").nth(13).focus()
    page.keyboard.press("Enter")
    page.locator("#worker").wait_for()
    assert fake.names[13] in page.locator("#worker h2").inner_text()
    assert "worker=" in page.url
    page.locator("#worker").get_by_text("close").press("Enter")
    page.locator("#worker").wait_for(state="detached")
    page.go_back()
    page.locator("#worker").wait_for()


def test_frozen_means_frozen(page: Page, fake: FakeAdmin) -> None:
    page.get_by_role("button", name="freeze").click()
    page.wait_for_timeout(300)
    fake.calm = True
    page.wait_for_timeout(2500)
    assert page.locator(".finding").count() == 2
    page.get_by_role("button", name="go on").click()
    page.get_by_text("Nothing found.").wait_for()


def test_light_and_dark_differ_and_are_kept(page: Page) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    button = page.locator("#theme")
    seen = set()
    for _ in range(3):
        button.click()
        seen.add(page.evaluate(ground))
    assert len(seen) == 2
    button.click()
    button.click()
    dark = page.evaluate(ground)
    page.reload()
    assert page.evaluate(ground) == dark


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_words_can_be_read(page: Page, theme: str) -> None:
    """Contrast of 4.5 to 1 (WCAG 2.2, AA) wherever there is text on a plain ground."""
    page.evaluate(f"document.documentElement.dataset.theme = '{theme}'")
    assert page.evaluate(CONTRAST) == []


def test_a_gateway_that_is_gone_is_said_so(browser: Browser, fake: FakeAdmin) -> None:
    with dashboard(fake) as url:
        page = browser.new_page(viewport=LAPTOP)  # type: ignore[arg-type]
        page.goto(url)
    page.get_by_text("no answer since").wait_for()
    page.close()


CONTRAST = """() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgb = (colour, under) => {
    canvas.fillStyle = under; canvas.fillRect(0, 0, 1, 1);
    canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const light = (c) => c.map(v => v / 255).map(
    v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4
  ).reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (e) => {
    const own = e && getComputedStyle(e).backgroundColor;
    if (!e) return 'white';
    if (own.startsWith('rgba') || own === 'transparent') return ground(e.parentElement);
    return own;
  };
  const poor = new Set();
  for (const e of document.querySelectorAll('body *:not(script):not(svg *)')) {
    const own = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    if (!own || !e.offsetParent || e.classList.contains('skip')) continue;
    const under = ground(e), over = getComputedStyle(e).color;
    const [a, b] = [light(rgb(over, under)), light(rgb(under, under))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    const said = `${e.className || e.nodeName} ${over} on ${under}: ${ratio.toFixed(2)}`;
    if (ratio < 4.5) poor.add(said);
  }
  return [...poor];
}"""
