"""A headless Chromium for tests, driven through its DevTools protocol over two pipes.

It needs Chromium (Debian and Ubuntu: `apt-get install chromium`) and no Python package.
"""

import base64
import json
import os
import select
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--window-size=1440,900",
    "--remote-debugging-pipe",
)


@dataclass
class Tab:
    """One page in the browser, with everything that it asked for or complained about."""

    browser: "Browser"
    session: str
    target: str = ""
    events: list[dict[str, Any]] = field(default_factory=list)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        return self.browser.call(method, params, self.session)

    def js(self, expression: str) -> Any:
        """The value of a JavaScript expression, as plain data."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def open(self, path: Path) -> None:
        self.call("Page.navigate", url=path.as_uri())
        deadline = time.monotonic() + 60
        while not self.js("document.readyState === 'complete' && location.protocol === 'file:'"):
            assert time.monotonic() < deadline, f"{path.name} did not load"
            time.sleep(0.02)
        self.settle()

    def open_circuit(self, path: Path) -> None:
        """Open a circuit page, and wait until it has unpacked and drawn itself."""
        self.open(path)
        deadline = time.monotonic() + 60
        while not self.js("document.documentElement.dataset.ready === 'yes'"):
            assert time.monotonic() < deadline, f"{path.name} did not draw itself"
            time.sleep(0.02)
        self.settle()

    def settle(self) -> None:
        """Two animation frames: everything that the last input caused has been drawn."""
        self.js("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done))).then(() => 1)")

    def press(self, key: str) -> None:
        codes = {
            "Enter": 13,
            " ": 32,
            "Tab": 9,
            "Escape": 27,
            "End": 35,
            "Home": 36,
            "ArrowLeft": 37,
            "ArrowUp": 38,
            "ArrowRight": 39,
            "ArrowDown": 40,
        }
        key_down = {"key": key, "windowsVirtualKeyCode": codes[key], "code": "Space" if key == " " else key}
        text = {"text": "\r" if key == "Enter" else key} if key in ("Enter", " ") else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", **key_down, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **key_down)

    def click(self, selector: str) -> None:
        """A real click in the middle of an element."""
        element = f"document.querySelector({json.dumps(selector)})"
        self.js(f"{element}.scrollIntoView({{block: 'nearest'}})")
        middle = "({x, y, width, height}) => [x + width / 2, y + height / 2]"
        box = self.js(f"({middle})({element}.getBoundingClientRect())")
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)
        self.settle()

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def complaints(self) -> list[dict[str, Any]]:
        """Whatever the page wrote to the console, threw, or had refused by its policy."""
        self.settle()
        kinds = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded", "Audits.issueAdded")
        return [event for event in self.events if event["method"] in kinds]

    def requests(self) -> list[str]:
        """Addresses asked for, apart from the page itself."""
        asked = [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]
        remote = [url for url in asked if not url.startswith(("file:", "data:"))]
        return remote + [url for url in asked if url.startswith("file:")][1:]


class Browser:
    """A headless Chromium, spoken to over two pipes (its file descriptors 3 and 4)."""

    def __init__(self, binary: str, profile: str):
        import fcntl  # a POSIX module; where it is missing the fixture skips before

        pipes = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (*os.pipe(), *os.pipe())]
        self._to_read, self._write, self._read, self._to_write = pipes
        quiet = os.open(os.devnull, os.O_WRONLY)
        ends = ((self._to_read, 3), (self._to_write, 4), (quiet, 1), (quiet, 2))
        actions = [(os.POSIX_SPAWN_DUP2, ours, theirs) for ours, theirs in ends]
        command = [binary, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        self._pid = os.posix_spawn(binary, command, dict(os.environ), file_actions=actions, setpgroup=0)
        for end in (quiet, self._to_read, self._to_write):
            os.close(end)
        self._buffer, self._count, self.tabs = b"", 0, {}

    def call(self, method: str, params: dict[str, Any], session: str | None = None) -> dict[str, Any]:
        self._count += 1
        message = {"id": self._count, "method": method, "params": params} | ({"sessionId": session} if session else {})
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next_message(timeout_s=60.0)
            if answer.get("id") == self._count:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            if answer.get("sessionId") in self.tabs:
                self.tabs[answer["sessionId"]].events.append(answer)

    def tab(self, scheme: str = "light", width: int = 1440, height: int = 900) -> Tab:
        target = self.call("Target.createTarget", {"url": "about:blank"})["targetId"]
        session = self.call("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        tab = self.attach(session, target)
        for domain in ("Page", "Runtime", "Log", "Network"):
            tab.call(f"{domain}.enable")
        tab.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        media = {"prefers-color-scheme": scheme, "prefers-reduced-motion": "reduce"}
        features = [{"name": name, "value": value} for name, value in media.items()]
        tab.call("Emulation.setEmulatedMedia", features=features)
        return tab

    def attach(self, session: str, target: str = "") -> Tab:
        """Keep the events of a session that the browser has opened."""
        self.tabs[session] = Tab(self, session, target)
        return self.tabs[session]

    def close_tabs(self) -> None:
        for tab in self.tabs.values():
            if tab.target:
                self.call("Target.closeTarget", {"targetId": tab.target})
        self.tabs.clear()

    def close(self) -> None:
        self.call("Browser.close", {})
        os.close(self._write)
        for _ in range(100):
            if os.waitpid(self._pid, os.WNOHANG)[0]:
                break
            time.sleep(0.05)
        else:
            os.killpg(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
        os.close(self._read)

    def _next_message(self, timeout_s: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], timeout_s)
            chunk = os.read(self._read, 1 << 20) if ready else b""
            assert chunk, "Chromium did not answer"
            self._buffer += chunk
        message, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(message)
