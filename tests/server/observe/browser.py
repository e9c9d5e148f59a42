"""A headless Chromium, driven through chromedriver's own HTTP protocol (W3C WebDriver): no package needed."""

from __future__ import annotations

import base64
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
ARGUMENTS = [
    "--headless=new",
    "--no-sandbox",  # Chromium's sandbox refuses to run as root
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]


def missing() -> str | None:
    """What is not installed, or None."""
    driver = shutil.which("chromedriver")
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    return None if driver and browser else "no Chromium with its chromedriver here (Debian: chromium chromium-driver)"


class BrowserError(Exception):
    pass


class Browser:
    """One window."""

    def __init__(self, width: int = 1440, height: int = 900) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        self._process = subprocess.Popen(
            ["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self._root = f"http://127.0.0.1:{port}"
        try:
            self._session = self._open(width, height)
        except BaseException:
            self._process.kill()
            raise

    def _open(self, width: int, height: int) -> str:
        until(lambda: self._is_up(), "chromedriver")
        options = {
            "binary": shutil.which("chromium") or shutil.which("google-chrome"),
            "args": [*ARGUMENTS, f"--window-size={width},{height}"],
        }
        capabilities = {"alwaysMatch": {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}}
        return str(self._ask("POST", "/session", {"capabilities": capabilities})["sessionId"])

    def _is_up(self) -> bool:
        try:
            return bool(self._ask("GET", "/status")["ready"])
        except OSError:
            return False

    def close(self) -> None:
        try:
            self._ask("DELETE", f"/session/{self._session}")
        finally:
            self._process.terminate()
            self._process.wait(10)

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if method != "POST" else json.dumps(body or {}).encode()
        request = urllib.request.Request(self._root + path, data, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise BrowserError(json.load(error)["value"]["message"].splitlines()[0]) from None

    def _do(self, path: str, **body: Any) -> Any:
        return self._ask("POST", f"/session/{self._session}/{path}", body)

    def go(self, address: str) -> None:
        self._do("url", url=address)

    def run(self, script: str, *arguments: Any) -> Any:
        """What `script` returns; it may be asynchronous."""
        return self._do("execute/sync", script=script, args=list(arguments))

    def find(self, selector: str) -> str:
        return str(self._do("element", using="css selector", value=selector)[ELEMENT])

    def click(self, selector: str) -> None:
        self._do(f"element/{self.find(selector)}/click")

    def type(self, selector: str, text: str) -> None:
        element = self.find(selector)
        self._do(f"element/{element}/clear")
        self._do(f"element/{element}/value", text=text)

    def text(self, selector: str) -> str:
        element = self.find(selector)
        return str(self._ask("GET", f"/session/{self._session}/element/{element}/text"))

    def point_at(self, selector: str, x: int, y: int) -> None:
        """Move the mouse to a point of an element, counted from its centre."""
        move = {"type": "pointerMove", "duration": 0, "x": x, "y": y, "origin": {ELEMENT: self.find(selector)}}
        self._do("actions", actions=[{"type": "pointer", "id": "mouse", "actions": [move]}])

    def command(self, name: str, **parameters: Any) -> Any:
        """Send a command of the DevTools protocol."""
        return self._do("goog/cdp/execute", cmd=name, params=parameters)

    def prefer(self, **features: str) -> None:
        """What media queries see: `prefer(color_scheme="dark")`."""
        pairs = [{"name": f"prefers-{name.replace('_', '-')}", "value": value} for name, value in features.items()]
        self.command("Emulation.setEmulatedMedia", features=pairs)

    def resize(self, width: int, height: int) -> None:
        self.command(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )

    def log(self) -> list[str]:
        """What the page has complained about since last asked: errors, and what its security policy refused."""
        return [entry["message"] for entry in self._do("se/log", type="browser")]

    def save(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._ask("GET", f"/session/{self._session}/screenshot")))


def until(condition: Callable[[], Any], what: str, seconds: float = 15.0) -> Any:
    """Wait for it; returns what it returned."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError(f"timed out after {seconds} s: {what}")
