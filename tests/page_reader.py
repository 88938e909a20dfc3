"""A headless Chromium that opens a page and is asked what it shows, over its own pipe (Chrome DevTools Protocol)."""

import fcntl
import json
import os
import select
import shutil
import signal
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any

_PATIENCE_SECONDS = 60  # a page that hangs must not hang the tests
CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)


class Browser:
    """One tab of a headless Chromium.

    `requests` lists every address that the page asked for, `errors` every exception of its scripts. Works as a context manager that ends the browser.
    """

    def __init__(self, width: int = 1280, height: int = 900):
        assert CHROMIUM is not None
        self._folder = TemporaryDirectory(ignore_cleanup_errors=True)
        (commands, self._write), (self._read, replies) = (map(_above_ten, os.pipe()) for _ in range(2))
        words = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", f"--user-data-dir={self._folder.name}"]
        words += ["--no-first-run", "--disable-dev-shm-usage", "--disable-extensions", "--disable-background-networking", "--hide-scrollbars"]
        silence = _above_ten(os.open(os.devnull, os.O_RDWR))
        places = [(commands, 3), (replies, 4), (silence, 1), (silence, 2)]  # Chromium reads commands from 3 and writes to 4
        actions = [(os.POSIX_SPAWN_DUP2, source, target) for source, target in places]
        self._pid = os.posix_spawn(CHROMIUM, words, os.environ, file_actions=actions, setsid=True)
        for descriptor in (commands, replies, silence):
            os.close(descriptor)
        self._number, self._rest, self._session = 0, b"", ""
        self.requests: list[str] = []
        self.errors: list[str] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network"):
            self.send(f"{domain}.enable")
        self.resize(width, height)

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        os.killpg(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        os.close(self._read)
        os.close(self._write)
        self._folder.cleanup()

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """The answer to one command."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params, **({"sessionId": self._session} if self._session else {})}
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._write, data) :]
        while (answer := self._receive()).get("id") != self._number:
            pass
        assert "error" not in answer, answer["error"]
        return answer["result"]

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            assert select.select([self._read], [], [], _PATIENCE_SECONDS)[0], "Chromium does not answer"
            data = os.read(self._read, 1 << 20)
            assert data, "Chromium has ended"
            self._rest += data
        line, self._rest = self._rest.split(b"\0", 1)
        message = json.loads(line)
        if message.get("method") == "Network.requestWillBeSent":
            self.requests.append(message["params"]["request"]["url"])
        if message.get("method") == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(message["params"]["exceptionDetails"]))
        return message

    def open(self, page: Path | str, fragment: str = "") -> None:
        """Loads a file, or what is behind an address, and waits until its scripts have run."""
        address = page if isinstance(page, str) else page.resolve().as_uri()
        self.requests.clear()
        self.errors.clear()
        self.send("Page.navigate", url="about:blank")
        self.send("Page.navigate", url=address + fragment)
        while self._receive().get("method") != "Page.loadEventFired":
            pass
        while self.ask("location.protocol + document.readyState") != f"{address.partition(':')[0]}:complete":
            pass

    def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page; promises are awaited."""
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def press(self, key: str) -> None:
        """One key, as from a keyboard: a letter, or a name such as ArrowRight, Enter, Tab, Escape."""
        text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
        code = {"Enter": 13, "Tab": 9, "Escape": 27, "ArrowLeft": 37, "ArrowRight": 39}.get(key, 0)
        self.send("Input.dispatchKeyEvent", type="keyDown", key=key, code=key, windowsVirtualKeyCode=code, **({"text": text} if text else {}))
        self.send("Input.dispatchKeyEvent", type="keyUp", key=key, code=key, windowsVirtualKeyCode=code)

    def point(self, selector: str) -> tuple[float, float]:
        """Moves the mouse onto the middle of the first element that matches; returns where that is."""
        box = f"(() => {{ const e = document.querySelector({json.dumps(selector)}); e.scrollIntoView({{block: 'center'}}); "
        x, y = self.ask(box + "const r = e.getClientRects()[0]; return [r.x + r.width / 2, r.y + r.height / 2]; })()")
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        return x, y

    def click(self, selector: str) -> None:
        """Clicks the middle of the first element that matches."""
        x, y = self.point(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def resize(self, width: int, height: int) -> None:
        """Sets the size of the window's inside, in CSS pixels."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def prefer(self, scheme: str) -> None:
        """Sets the system's colour scheme: light or dark."""
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])


def _above_ten(descriptor: int) -> int:
    """The same file under a number that 3 and 4 cannot overwrite."""
    moved = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(descriptor)
    return moved
