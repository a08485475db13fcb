"""A headless Chromium for tests and benchmarks, driven over the pipe of its DevTools protocol."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import signal
import time
from pathlib import Path
from typing import Any, Self

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_KEYS = {
    "Enter": 13,
    "Escape": 27,
    "ArrowLeft": 37,
    "ArrowUp": 38,
    "ArrowRight": 39,
    "ArrowDown": 40,
    "Tab": 9,
    " ": 32,
}


class Browser:
    """One process; `page` opens pages in it, one after the other in the same tab."""

    def __init__(self, profile: Path, *words: str) -> None:
        assert CHROMIUM
        to_browser, ours_out = os.pipe()
        ours_in, from_browser = os.pipe()
        flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
        more = ["--remote-debugging-pipe", f"--user-data-dir={profile}", "--hide-scrollbars", *words, "about:blank"]
        with Path(os.devnull).open("w") as nothing:
            self._process = os.posix_spawn(
                CHROMIUM,
                [CHROMIUM, *flags.split(), *more],
                {key: value for key, value in os.environ.items() if "proxy" not in key.lower()},
                file_actions=[
                    (os.POSIX_SPAWN_DUP2, nothing.fileno(), 1),
                    (os.POSIX_SPAWN_DUP2, nothing.fileno(), 2),
                    (os.POSIX_SPAWN_DUP2, to_browser, 63),  # aside, for either may have the number of the other
                    (os.POSIX_SPAWN_DUP2, from_browser, 4),
                    (os.POSIX_SPAWN_DUP2, 63, 3),
                    (os.POSIX_SPAWN_CLOSE, 63),
                ],
                setsid=True,
            )
        os.close(to_browser)
        os.close(from_browser)
        self._in, self._out, self._rest, self._number = ours_in, ours_out, b"", 0
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []
        target = self.send("Target.getTargets")["targetInfos"][0]["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        os.killpg(self._process, signal.SIGKILL)
        os.waitpid(self._process, 0)
        os.close(self._in)
        os.close(self._out)

    @property
    def process(self) -> int:
        """Number of the browser's first process, which leads the group of all of them."""
        return self._process

    def send(self, method: str, seconds: float = 60, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol and wait for its answer; events that come meanwhile go into `events`."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + seconds
        while True:
            answer = self._receive(until)
            if answer is None:
                raise TimeoutError(method)
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self.events.append(answer)

    def _receive(self, until: float) -> dict[str, Any] | None:
        while b"\0" not in self._rest:
            if not select.select([self._in], [], [], max(0, until - time.monotonic()))[0]:
                return None
            data = os.read(self._in, 1 << 20)
            if not data:
                raise RuntimeError("the browser has ended")
            self._rest += data
        text, self._rest = self._rest.split(b"\0", 1)
        return json.loads(text)

    def open(self, page: Path, fragment: str = "", seconds: float = 60) -> None:
        """Open a file, and wait until all of its scripts have run."""
        self.send("Page.navigate", url="about:blank")
        self.events.clear()
        self.send("Page.navigate", url=page.as_uri() + fragment)
        self.wait("location.protocol === 'file:' && document.readyState === 'complete'", seconds)

    def run(self, script: str) -> Any:
        """Value of an expression in the page, which may be a promise."""
        answer = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"].get("exception", answer["exceptionDetails"]))
        return answer["result"].get("value")

    def wait(self, condition: str, seconds: float = 10) -> None:
        """Wait until an expression in the page is true."""
        until = time.monotonic() + seconds
        while not self.run(f"Boolean({condition})"):
            if time.monotonic() > until:
                raise TimeoutError(condition)
            time.sleep(0.02)

    def press(self, *keys: str) -> None:
        """Press keys, one after the other."""
        for key in keys:
            text = "\r" if key == "Enter" else key if len(key) == 1 else ""
            code = {"windowsVirtualKeyCode": _KEYS.get(key, ord(key[0].upper()))}
            self.send("Input.dispatchKeyEvent", type="keyDown", key=key, text=text, **code)
            self.send("Input.dispatchKeyEvent", type="keyUp", key=key, **code)

    def type(self, text: str) -> None:
        """Type a text into the field that has the focus."""
        self.send("Input.insertText", text=text)

    def mouse(self, kind: str, x: float, y: float, **more: Any) -> None:
        """A mouse event: `mousePressed`, `mouseMoved`, `mouseReleased`, `mouseWheel`."""
        button = {"button": "left", "clickCount": 1} if kind != "mouseWheel" else {}
        self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, **(button | more))

    def click(self, selector: str) -> None:
        """Click the middle of an element."""
        place = self.run(
            f"(e => {{ e.scrollIntoView({{ block: 'nearest' }}); const b = e.getBoundingClientRect(); "
            f"return [b.x + b.width / 2, b.y + b.height / 2]; }})(document.querySelector({json.dumps(selector)}))"
        )
        self.mouse("mousePressed", *place)
        self.mouse("mouseReleased", *place)

    def look(self, width: int, height: int, dark: bool = False, phone: bool = False) -> None:
        """Set the size of the window and the colour scheme."""
        scale = 2 if phone else 1
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=phone
        )
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.send("Emulation.setEmulatedMedia", features=scheme)

    def screenshot(self, file: Path) -> None:
        """Write what is seen as a PNG file."""
        file.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"]))

    def requests(self) -> list[str]:
        """Addresses that the page has asked for, other than its own texts."""
        sent = [e["params"]["request"]["url"] for e in self.events if e.get("method") == "Network.requestWillBeSent"]
        return [address for address in sent if not address.startswith(("data:", "blob:"))]

    def errors(self) -> list[str]:
        """Messages of the console, breaches of the policy, and errors that nobody caught."""
        found = []
        for event in self.events:
            kind, content = event.get("method"), event.get("params", {})
            if kind == "Log.entryAdded" and content["entry"]["level"] == "error":
                found.append(content["entry"]["text"])
            elif kind == "Runtime.consoleAPICalled":
                found.append(json.dumps(content["args"]))
            elif kind == "Runtime.exceptionThrown":
                found.append(json.dumps(content["exceptionDetails"]))
        return found
