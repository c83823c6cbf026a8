"""A real browser without a screen, driven through a pipe: the DevTools protocol with nothing but the standard library.

Messages are JSON that ends with a zero byte; the browser reads them from descriptor 3 and answers on descriptor 4.
"""

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
OPTIONS = (
    "--headless=new",
    "--disable-gpu",
    "--disable-dev-shm-usage",  # containers have little of it
    "--disable-extensions",
    "--disable-background-networking",
    "--hide-scrollbars",
    "--no-first-run",
    "--remote-debugging-pipe",
)
LAUNCHER = """
import os, sys
asks, answers = (os.dup(int(number)) for number in sys.argv[1:3])  # out of the way of 3 and 4, or of each other
spare = [os.dup(asks), os.dup(answers)]
asks, answers = (os.dup2(number, 60 + place) for place, number in enumerate(spare))
os.dup2(asks, 3), os.dup2(answers, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


CONTRAST = """
(() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const read = color => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
    return canvas.getImageData(0, 0, 1, 1).data;
  };
  const light = color => {
    const [r, g, b] = Array.from(read(color)).map(v => v / 255)
      .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = element => {
    for (let one = element; one; one = one.parentElement) {
      const color = getComputedStyle(one).backgroundColor;
      if (read(color)[3] === 255) return color;
    }
    return getComputedStyle(document.body).backgroundColor;
  };
  let worst = [21, 'no text'];
  for (const element of document.body.querySelectorAll('*')) {
    const text = Array.from(element.childNodes).filter(n => n.nodeType === 3).map(n => n.data).join('').trim();
    if (!text || element.tagName === 'title') continue;
    const style = getComputedStyle(element);
    const [a, b] = [light(element.ownerSVGElement ? style.fill : style.color), light(behind(element))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < worst[0]) worst = [ratio, text];
  }
  return worst;
})()
"""


class BrowserUnavailable(Exception):
    """There is no browser, or it does not start or answer on this machine."""


def find_browser() -> str | None:
    """Return the path of a browser that speaks the protocol; None where there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One browser, with one page at a time; a context manager.

    Args:
        folder: Empty; the browser's profile goes there.
        patience_s: How long an answer may take before the browser counts as unavailable.
    """

    def __init__(self, folder: Path, patience_s: float = 60.0) -> None:
        self.folder, self.patience_s = folder, patience_s
        self.events: list[dict[str, Any]] = []
        self._number, self._rest = 0, b""
        self._session: str | None = None

    def __enter__(self) -> "Browser":
        path = find_browser()
        if path is None:
            raise BrowserUnavailable(f"none of {', '.join(NAMES)} is installed")
        asks_read, self._asks = os.pipe()
        self._answers, answers_write = os.pipe()
        sandbox = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
        command = [path, *OPTIONS, *sandbox, f"--user-data-dir={self.folder}", "about:blank"]
        launcher = [sys.executable, "-c", LAUNCHER, str(asks_read), str(answers_write), *command]
        self._process = subprocess.Popen(
            launcher, pass_fds=(asks_read, answers_write), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(asks_read)
        os.close(answers_write)
        try:
            self._ask("Browser.getVersion")
        except BrowserUnavailable:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the browser."""
        os.close(self._asks)  # it ends by itself then
        try:
            self._process.wait(min(10.0, self.patience_s))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._answers)

    def open(self, url: str, width: int, height: int = 900, *, is_dark: bool = False) -> None:
        """Show a page of its own in a window of that size, and wait until it is loaded; `events` are then of it."""
        self._session = None
        target = self._ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.events.clear()
        for domain in ("Page", "Network", "Runtime", "Log"):
            self._ask(f"{domain}.enable")
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self._ask("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        self._ask("Emulation.setEmulatedMedia", features=[scheme])
        self._ask("Page.navigate", url=url)
        self._wait("Page.loadEventFired")

    def overflow(self, width: int) -> int:
        """Return by how many pixels the page is wider than the window that was asked for.

        A phone zooms out to show a page that is too wide, and its `innerWidth` grows, so that it says nothing here.
        """
        found: int = self.evaluate("document.documentElement.scrollWidth")
        return max(0, found - width)

    def worst_contrast(self) -> tuple[float, str]:
        """Return the least contrast of a text with what is behind it, from 1 to 21 (WCAG), and the text."""
        found: list[Any] = self.evaluate(CONTRAST)
        return found[0], found[1]

    def evaluate(self, expression: str) -> Any:
        """Return the value of an expression in the page; the page's own policy on scripts does not bind the tools."""
        found = self._ask("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def screenshot(self, path: Path) -> None:
        """Write the whole page, as high as it is, as PNG."""
        found = self._ask("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(found["data"]))

    def print_pdf(self, path: Path) -> None:
        """Write the page as it is printed."""
        found = self._ask("Page.printToPDF", printBackground=False, preferCSSPageSize=True)
        path.write_bytes(base64.b64decode(found["data"]))

    def requests(self) -> list[str]:
        """Return what the page has asked for, itself and data in it left out."""
        urls = [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]
        return [url for url in urls if not url.startswith(("file:", "data:", "about:"))]

    def complaints(self) -> list[str]:
        """Return what the browser has said about the page: its log, its console, exceptions."""
        methods = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
        return [json.dumps(event["params"]) for event in self.events if event["method"] in methods]

    def _ask(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        try:
            os.write(self._asks, json.dumps(message).encode() + b"\0")
        except BrokenPipeError as error:
            raise BrowserUnavailable("it ended by itself") from error
        deadline = time.monotonic() + self.patience_s
        while True:
            answer = self._read(deadline)
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer["error"])
                result: dict[str, Any] = answer["result"]
                return result
            if "method" in answer:
                self.events.append(answer)

    def _wait(self, method: str) -> None:
        deadline = time.monotonic() + self.patience_s
        while not any(event["method"] == method for event in self.events):
            answer = self._read(deadline)
            if "method" in answer:
                self.events.append(answer)

    def _read(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._answers], [], [], max(0.0, deadline - time.monotonic()))
            part = os.read(self._answers, 1 << 20) if ready else None
            if not part:
                why = f"it does not answer within {self.patience_s:g} s" if part is None else "it ended by itself"
                raise BrowserUnavailable(why)
            self._rest += part
        message, _, self._rest = self._rest.partition(b"\0")
        answer: dict[str, Any] = json.loads(message)
        return answer


def main(arguments: Sequence[str]) -> None:
    """Write pictures of a page: python tests/browser.py PAGE.html FOLDER."""
    import tempfile

    page, folder = Path(arguments[0]).resolve(), Path(arguments[1])
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile, Browser(Path(profile)) as browser:
        for name, width, is_dark in (
            ("desktop", 1280, False),
            ("desktop-dark", 1280, True),
            ("phone", 390, False),
            ("phone-dark", 390, True),
        ):
            browser.open(page.as_uri(), width, is_dark=is_dark)
            browser.screenshot(folder / f"{page.stem}-{name}.png")
        browser.print_pdf(folder / f"{page.stem}.pdf")


if __name__ == "__main__":
    main(sys.argv[1:])
