"""Chromium without a window, driven by chromedriver over its own protocol (W3C WebDriver), with nothing but Python."""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--hide-scrollbars"]


class Page:
    """A page that is open."""

    def __init__(self, base: str) -> None:
        self._base = base

    def evaluate(self, script: str, *arguments: Any) -> Any:
        """What ``script`` returns."""
        return _call("POST", f"{self._base}/execute/sync", {"script": script, "args": list(arguments)})

    def press(self, selector: str, keys: str) -> None:
        """Send keys to the element that ``selector`` finds."""
        found = _call("POST", f"{self._base}/element", {"using": "css selector", "value": selector})
        _call("POST", f"{self._base}/element/{next(iter(found.values()))}/value", {"text": keys})

    def screenshot(self, path: Path) -> None:
        """The whole page as a PNG."""
        height = self.evaluate("return document.documentElement.scrollHeight")
        self.resize(1200, height + 200)
        path.write_bytes(base64.b64decode(_call("GET", f"{self._base}/screenshot")))

    def resize(self, width: int, height: int) -> None:
        """Make the window so large."""
        _call("POST", f"{self._base}/window/rect", {"width": width, "height": min(height, 16000)})

    def console(self) -> list[str]:
        """What the console says since it was asked last: errors and warnings of the page, its scripts and its policy."""
        return [entry["message"] for entry in _call("POST", f"{self._base}/se/log", {"type": "browser"})]

    def requests(self) -> list[str]:
        """Every address asked for since it was asked last, that of the page too."""
        found = []
        for entry in _call("POST", f"{self._base}/se/log", {"type": "performance"}):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                found.append(message["params"]["request"]["url"])
        return found


@contextlib.contextmanager
def opened(file: Path, folder: Path, *, dark: bool = False) -> Iterator[Page]:
    """``file`` in a browser with a profile of its own in ``folder``."""
    port = _free_port()
    driver = subprocess.Popen([str(DRIVER), f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        base = f"http://127.0.0.1:{port}"
        _wait(base)
        arguments = [*FLAGS, f"--user-data-dir={folder / f'profile-{port}'}", "--window-size=1200,900"]
        if dark:
            arguments.append("--blink-settings=preferredColorScheme=0")
        options = {"binary": CHROMIUM, "args": arguments}
        capabilities = {"alwaysMatch": {"browserName": "chrome", "goog:chromeOptions": options,
                                        "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"}}}
        session = _call("POST", f"{base}/session", {"capabilities": capabilities})["sessionId"]
        page = Page(f"{base}/session/{session}")
        try:
            _call("POST", f"{base}/session/{session}/url", {"url": "about:blank"})
            page.requests()  # those of the browser's own first page
            _call("POST", f"{base}/session/{session}/url", {"url": file.absolute().as_uri()})
            yield page
        finally:
            _call("DELETE", f"{base}/session/{session}")
    finally:
        driver.terminate()
        driver.wait(30)


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def _wait(base: str) -> None:
    for _ in range(150):
        with contextlib.suppress(OSError):
            if _call("GET", f"{base}/status")["ready"]:
                return
        time.sleep(0.2)
    raise RuntimeError("chromedriver did not start")


def _call(method: str, url: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the driver is on this machine
    try:
        with opener.open(request, timeout=120) as answer:
            return json.load(answer)["value"]
    except urllib.error.HTTPError as error:
        raise RuntimeError(f"{method} {url}: {error.read().decode()[:500]}") from None
