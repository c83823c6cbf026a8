"""The pages in a real browser: nothing is cut off, nothing is fetched, nothing is complained of, all can be read.

Skipped where no Chromium or Chrome is installed, or where it does not start. A page at fault is never skipped.
"""

import copy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import NAMES, Browser, BrowserUnavailable, find_browser
from report_samples import CONFIG, ENVIRONMENT, failing_verdict, passing_verdict, sample_stages

from compress.model.artifacts import Verdict
from compress.report.build import build_report
from compress.report.compare import render_comparison
from compress.report.model import read_report
from compress.report.page import render_report

DESKTOP, PHONE = 1280, 390
LONG = "a_name_that_somebody_has_chosen_without_any_thought_of_phones"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if sys.platform == "win32" or find_browser() is None:
        pytest.skip(f"no browser to look at pages with: none of {', '.join(NAMES)} is installed")
    opened = Browser(tmp_path_factory.mktemp("profile"))
    try:
        opened.__enter__()
    except BrowserUnavailable as error:
        pytest.skip(f"{find_browser()} cannot be used here: {error}")
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pages: of one run, rich, failed, with long names and with next to nothing; and of several."""
    folder = tmp_path_factory.mktemp("pages")
    rich = build_report("rich", passing_verdict(), sample_stages(), CONFIG, ENVIRONMENT)
    failed = build_report("failed", failing_verdict(), sample_stages(), CONFIG, ENVIRONMENT)
    named = rename(rich)
    bare = build_report("bare", Verdict((), (), None, None), [], {}, {})
    for report in (rich, failed, named, bare):
        name = "named" if report is named else report["name"]
        (folder / f"{name}.html").write_text(render_report(read_report(report)), encoding="utf-8")
    different = {**rich, "environment": {"cpu": "Other"}}
    several = [read_report(report) for report in (rich, failed, named, different, bare)]
    names = ["rich", "failed", LONG, "elsewhere", "bare"]
    (folder / "two.html").write_text(render_comparison(several[:2], names[:2]), encoding="utf-8")
    (folder / "several.html").write_text(render_comparison(several, names), encoding="utf-8")
    return folder


def rename(report: dict[str, Any]) -> dict[str, Any]:
    """Return the report with long names wherever a user may have chosen one."""
    report = copy.deepcopy(report)
    report["name"] = LONG
    report["config"] = {LONG: {LONG: LONG}}
    report["environment"]["cpu"] = LONG
    report["verdict"]["checks"][0] |= {"name": LONG, "detail": LONG}
    report["details"]["quality"]["classes"] = [f"{LONG}_{number}" for number in range(12)]
    report["details"]["robustness"]["distributions"][-1]["name"] = LONG
    report["details"]["providers"]["fell_back"] = [f"{LONG} {LONG}"] * 3
    report["stages"][1]["record"]["groups"][0]["name"] = LONG
    report["stages"][1]["record"]["removed_blocks"] = [LONG]
    return report


def look(browser: Browser, path: Path, width: int, is_dark: bool = False) -> None:
    """Open a page from disk; skips the test when the browser has given up."""
    try:
        browser.open(path.as_uri(), width, is_dark=is_dark)
    except BrowserUnavailable as error:
        pytest.skip(f"the browser cannot be used any more: {error}")


@pytest.mark.parametrize("is_dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [DESKTOP, PHONE])
@pytest.mark.parametrize("name", ["rich", "failed", "named", "bare", "two", "several"])
def test_a_page_fits_and_can_be_read_and_is_alone(
    browser: Browser, pages: Path, name: str, width: int, is_dark: bool
) -> None:
    look(browser, pages / f"{name}.html", width, is_dark)
    assert browser.overflow(width) == 0
    assert browser.requests() == []
    assert browser.complaints() == []
    contrast, text = browser.worst_contrast()
    assert contrast >= 4.5, text
    broken = "Array.from(document.images).filter(one => !one.complete || !one.naturalWidth).length"
    assert browser.evaluate(broken) == 0


def test_dark_is_dark(browser: Browser, pages: Path) -> None:
    color = "getComputedStyle(document.body).backgroundColor"
    look(browser, pages / "rich.html", DESKTOP)
    light = browser.evaluate(color)
    look(browser, pages / "rich.html", DESKTOP, is_dark=True)
    assert light != browser.evaluate(color)


def test_pages_unfold(browser: Browser, pages: Path) -> None:
    for name in ("rich", "several"):
        look(browser, pages / f"{name}.html", PHONE)
        unfolded = browser.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
        assert unfolded is None
        assert browser.overflow(PHONE) == 0


def test_a_page_is_printed(browser: Browser, pages: Path, tmp_path: Path) -> None:
    look(browser, pages / "rich.html", DESKTOP)
    browser.print_pdf(tmp_path / "rich.pdf")
    assert (tmp_path / "rich.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize("width", [DESKTOP, PHONE])
def test_a_page_at_fault_would_be_found(browser: Browser, pages: Path, tmp_path: Path, width: int) -> None:
    page = (pages / "bare.html").read_text(encoding="utf-8")
    faults = (
        '<div style="width: 1500px">wide</div><p style="color: #777; background: #777">grey on grey</p>'
        '<img src="https://example.invalid/a.png"><script>1</script></main>'
    )
    (tmp_path / "bad.html").write_text(page.replace("</main>", faults), encoding="utf-8")
    look(browser, tmp_path / "bad.html", width)
    assert browser.overflow(width) > 200
    assert browser.worst_contrast() == (1, "grey on grey")
    said = " ".join(browser.complaints())
    assert "example.invalid" in said
    assert "script" in said

    policy = page.index("<meta http-equiv")
    free = page[:policy] + page[page.index(">", policy) + 1 :]
    (tmp_path / "free.html").write_text(free.replace("</main>", faults), encoding="utf-8")
    look(browser, tmp_path / "free.html", width)
    assert "https://example.invalid/a.png" in browser.requests()


@pytest.mark.skipif(sys.platform == "win32", reason="no descriptors are handed on there")
def test_a_browser_that_is_not_there_is_said_to_be_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("browser.find_browser", lambda: None)
    with pytest.raises(BrowserUnavailable, match=r"none of chromium, .* is installed"), Browser(tmp_path):
        pass
    monkeypatch.setattr("browser.find_browser", lambda: sys.executable)  # a program that is no browser
    with pytest.raises(BrowserUnavailable, match="it ended by itself"), Browser(tmp_path):
        pass
    silent = tmp_path / "silent"
    silent.write_text(f"#!{sys.executable}\nimport time\ntime.sleep(600)\n")
    silent.chmod(0o755)
    monkeypatch.setattr("browser.find_browser", lambda: str(silent))
    with pytest.raises(BrowserUnavailable, match=r"it does not answer within 0\.5 s"), Browser(tmp_path, 0.5):
        pass
