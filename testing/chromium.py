"""A real headless Chromium, driven over its DevTools protocol; no fixture of it without one."""

import base64
import itertools
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import websocket

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# Root may not use Chromium's sandbox; the pages here are the tests' own.
_OPTIONS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            "--hide-scrollbars", "--no-first-run", "--disable-background-networking",
            "--remote-debugging-port=0", "--remote-allow-origins=*")  # fmt: skip

# The inspector says when it has drawn, and how long it took.
READY = "document.documentElement?.dataset?.ready ?? null"
# Pages without a script are drawn when they are loaded.
LOADED = "document.readyState === 'complete' ? performance.now() : null"


class Browser:
    """One tab. Errors of the page's script are collected, and so are its network requests."""

    def __init__(self, socket: websocket.WebSocket) -> None:
        self._socket = socket
        self._ids = itertools.count(1)
        self._events: list[dict[str, Any]] = []
        self.errors: list[str] = []
        self.requests: list[str] = []
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command, and its answer."""
        wanted = next(self._ids)
        self._socket.send(json.dumps({"id": wanted, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv())
            if message.get("id") == wanted:
                assert "error" not in message, message["error"]
                result: dict[str, Any] = message["result"]
                return result
            self._note(message)

    def _note(self, event: dict[str, Any]) -> None:
        method, parameters = event.get("method"), event.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(parameters["exceptionDetails"])[:800])
        elif method == "Log.entryAdded" and parameters["entry"]["level"] == "error":
            self.errors.append(parameters["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"][:100])

    def open(self, path: Path | str, *, width: int = 1280, height: int = 900, scheme: str = "light",
             reduced_motion: bool = False, ready: str = READY) -> float:  # fmt: skip
        """Open a file or an address; returns milliseconds from there to the first full drawing.

        Args:
            path: of the file, or the address.
            width, height: of the window, pixels.
            scheme: of colours that the reader prefers, `light` or `dark`.
            reduced_motion: whether the reader prefers that.
            ready: an expression that is null until the page has drawn everything.
        """
        self.errors.clear()
        self.requests.clear()
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height,
                  deviceScaleFactor=1, mobile=False)  # fmt: skip
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        if reduced_motion:
            features.append({"name": "prefers-reduced-motion", "value": "reduce"})
        self.send("Emulation.setEmulatedMedia", features=features)
        url = path if isinstance(path, str) else path.resolve().as_uri()
        self.send("Page.navigate", url=url)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            answer = self.run(ready)
            if answer is not None:
                return float(answer)
            time.sleep(0.02)
        raise AssertionError(f"the page did not become ready: {self.errors}")

    def run(self, script: str) -> Any:
        """The value of an expression, awaited if it is a promise."""
        answer = self.send(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def press(self, key: str, *, shift: bool = False) -> None:
        """A key, as a keyboard gives it; then two frames."""
        codes = {"Tab": 9, "Enter": 13, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39,
                 "ArrowDown": 40, "Home": 36, "End": 35, "+": 187, "0": 48}  # fmt: skip
        same = {"key": key, "windowsVirtualKeyCode": codes[key], "modifiers": 8 if shift else 0}
        text = {"Enter": "\r", "+": "+", "0": "0"}.get(key)
        self.send("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown",
                  **({"text": text} if text else {}), **same)  # fmt: skip
        self.send("Input.dispatchKeyEvent", type="keyUp", **same)
        self.settle()

    def settle(self) -> None:
        """Wait for two frames: what was asked for has been drawn."""
        self.run("new Promise(d => requestAnimationFrame(() => requestAnimationFrame(d)))")

    def wait(self, condition: str) -> None:
        """Wait until an expression holds; what went wrong on the page is said if it does not."""
        deadline = time.monotonic() + 20
        while not self.run(f"Boolean({condition})"):
            said = self.run("document.getElementById('ask-status')?.textContent")
            assert time.monotonic() < deadline, (condition, said, self.errors)
            time.sleep(0.01)

    def drawn(self) -> None:
        """Wait until every view of an inspector's page shows what is chosen."""
        self.settle()
        self.wait("document.documentElement.dataset.stale === '0'")

    def screenshot(self, selector: str = "") -> bytes:
        """A PNG of the window, or of the one element that a selector means, with some margin."""
        clip = {}
        if selector:
            box = self.run(
                f"(() => {{ const b = document.querySelector({json.dumps(selector)})"
                ".getBoundingClientRect();"
                "return [b.x + scrollX - 16, b.y + scrollY, b.width + 32, b.height]; })()"
            )
            clip = {"clip": dict(zip(("x", "y", "width", "height"), box, strict=True), scale=1)}
        answer = self.send(
            "Page.captureScreenshot", format="png", captureBeyondViewport=bool(clip), **clip
        )
        return base64.b64decode(answer["data"])


def start_browser(profile: Path) -> tuple[subprocess.Popen[bytes], Browser]:
    """Start Chromium with a profile of its own.

    Raises:
        FileNotFoundError: none is installed.
    """
    program = next(filter(None, map(shutil.which, _NAMES)), None)
    if program is None:
        raise FileNotFoundError(f"no {' or '.join(_NAMES)} on PATH")
    process = subprocess.Popen(
        [program, *_OPTIONS, f"--user-data-dir={profile}", "about:blank"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    port_file, deadline = profile / "DevToolsActivePort", time.monotonic() + 30
    while not (port_file.exists() and port_file.read_text().count("\n")):
        if process.poll() is not None or time.monotonic() > deadline:
            raise AssertionError(f"Chromium did not start: exit code {process.poll()}")
        time.sleep(0.05)
    port = port_file.read_text().split("\n")[0]
    # The browser's own socket would need sessions; a tab has one to itself.
    import urllib.request

    with urllib.request.urlopen(f"http://127.0.0.1:{port}/json") as answer:
        tab = next(each for each in json.load(answer) if each["type"] == "page")
    return process, Browser(websocket.create_connection(tab["webSocketDebuggerUrl"], timeout=60))


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A tab of a real Chromium; the test is skipped where there is none."""
    try:
        process, browser = start_browser(tmp_path_factory.mktemp("chromium"))
    except FileNotFoundError as error:
        pytest.skip(f"needs Chromium: {error} (Debian: apt-get install chromium)")
    yield browser
    process.terminate()
    process.wait(timeout=30)
