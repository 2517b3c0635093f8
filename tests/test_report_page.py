"""report.html in a browser: no requests, no console errors, tooltips, narrow windows, dark mode, print."""

from itertools import product

import pytest

from tests.support.commands import SMALL, train


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Two methods over betas and learning rates."""
    folder = tmp_path_factory.mktemp("report")
    grid = ["-m", "method=dpo,asft", "beta=0.05,0.1", "lr=5e-4,1e-3", "sweep.name=page"]
    train(*grid, *SMALL, f"output_dir={folder}")
    return folder / "sweeps" / "page" / "report.html"


@pytest.fixture
def open_page(browser, report):
    """Open the report in a new context; fail on any console error or request to another address."""
    problems, contexts = [], []

    def opened(width=1280, scheme="light", name="report.html"):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: message.type in ("error", "warning") and problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: request.url.startswith("file:") or problems.append(request.url))
        page.goto(report.with_name(name).as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not problems


def test_every_link_and_every_details_element_can_be_clicked(open_page):
    page = open_page()
    links = page.locator("nav a")
    assert links.count() >= 6
    for link in links.all():
        link.click()
        assert page.locator(link.get_attribute("href")).count() == 1
    for summary in page.locator("summary").all():
        summary.click()
    assert page.locator("#points tbody tr").count() == 8 and page.locator("#points tr.selected").count() == 2
    assert page.locator("#samples blockquote").count() >= 3


def hover(page, mark):
    mark.scroll_into_view_if_needed()
    # Scrolling hides tooltips; the page hears of it before it draws the next frame.
    page.evaluate("new Promise(drawn => requestAnimationFrame(() => requestAnimationFrame(drawn)))")
    mark.hover()


def test_a_mark_has_a_tooltip_with_its_point(open_page):
    page = open_page()
    tip = page.locator("#tip")
    assert not tip.is_visible()
    hover(page, page.locator(".mark[data-tip^='DPO, beta 0.1']").first)
    assert tip.is_visible() and "lr 0.0" in tip.inner_text() and "KL" in tip.inner_text()
    page.mouse.move(2, 2)
    assert not tip.is_visible()
    hover(page, page.locator(".bar").first)
    assert "[" in tip.inner_text()


def test_a_heat_map_has_every_point_of_the_grid(open_page):
    tips = open_page().locator("svg[aria-label*='on the selection split (frame'] [data-tip]")
    assert tips.count() == 8
    points = {tips.nth(n).get_attribute("data-tip").split("\n")[0] for n in range(8)}
    grid = product(("DPO", "ASFT"), ("0.05", "0.1"), ("0.0005", "0.001"))
    assert points == {f"{name}, beta {beta}, lr {lr}" for name, beta, lr in grid}


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_is_not_wider_than_the_window(open_page, width):
    page = open_page(width)
    page.locator("#points summary").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_text_and_axes_are_readable_in_dark_mode(open_page):
    for scheme, dark in (("light", False), ("dark", True)):
        page = open_page(scheme=scheme)
        colors = page.evaluate(
            "['body', 'svg text', '#best td'].map(s => getComputedStyle(document.querySelector(s)))"
            ".map((style, i) => i === 1 ? style.fill : i === 0 ? style.backgroundColor : style.color)"
        )
        light = [sum(map(int, c[c.index("(") + 1 : -1].split(",")[:3])) > 384 for c in colors]
        assert light == ([False, True, True] if dark else [True, False, False]), (scheme, colors)
        assert page.locator("svg [style*='#000000']").count() == 0


def test_the_page_can_be_printed(open_page, tmp_path):
    page = open_page()
    page.pdf(path=tmp_path / "report.pdf", format="A4", print_background=True)
    assert (tmp_path / "report.pdf").stat().st_size > 20_000
