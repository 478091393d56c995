"""A real, headless Chromium for the tests, from the system's packages: no wheel contains it.

If it is not installed, its tests are skipped; with ``SINGLETON_TEST_CHROMIUM=required`` in the
environment, as in CI, they fail. The tests send requests of the browser's DevTools protocol through
two pipes. Each message is a JSON text that ends in a NUL.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import itertools
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.helpers.waiting import DEADLINE, wait_until

NAMES = ("chromium", "chromium-browser", "google-chrome")
#: A program that opens two pipes as descriptors 3 and 4, from and to which the browser reads and
#: writes, and then becomes the browser.
LAUNCH = """
import os, sys
orders, answers = int(sys.argv[1]), int(sys.argv[2])
os.dup2(orders, 3)
os.dup2(answers, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


def find_chromium() -> str:
    """Return the path of the browser; skip the test if it is not installed."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found:
        return found
    assert os.environ.get("SINGLETON_TEST_CHROMIUM") != "required", "no Chromium here"
    pytest.skip("no Chromium here")


class Chromium:
    """A browser with a home directory of its own, and all its processes in one process group."""

    def __init__(self, home: Path) -> None:
        path = find_chromium()
        self._answers, theirs_out = os.pipe()
        theirs_in, self._orders = os.pipe()
        # Give the pipes descriptors above 4, so that neither is overwritten when the other becomes
        # 3 or 4.
        ends = [_above(theirs_in), _above(theirs_out)]
        environment = os.environ | {"HOME": str(home), "TMPDIR": str(home)}
        for name in ("XDG_CONFIG_HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME", "XDG_RUNTIME_DIR"):
            environment[name] = str(home)
        with (home / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-c", LAUNCH, *map(str, ends), path),
                    *("--headless", "--remote-debugging-pipe", f"--user-data-dir={home}/profile"),
                    *("--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
                    *("--no-first-run", "--no-default-browser-check", "--disable-extensions"),
                    *("--disable-background-networking", "--disable-component-update"),
                    *("--disable-sync", "--disable-breakpad", "--hide-scrollbars", "--mute-audio"),
                    *("--force-color-profile=srgb", "--lang=en-US", "about:blank"),
                ],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=ends,
                start_new_session=True,
            )
        for end in ends:
            os.close(end)
        self._home = home
        self._numbers = itertools.count(1)
        self._buffer = b""

    def call(self, method: str, session: str | None = None, **parameters: Any) -> Any:
        """Send one request, and return the browser's answer."""
        number = self._send(method, session, parameters)
        end = time.monotonic() + DEADLINE
        while True:
            answer = json.loads(self._next(end))
            if answer.get("id") == number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def open(self, url: str, width: int = 1280, height: int = 800, dark: bool = False) -> Tab:
        return Tab(self, url, width, height, dark)

    def close(self) -> None:
        """Ask the browser to close, so that it reaps its children; kill it if it does not end."""
        self._send("Browser.close", None, {})
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=10)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(timeout=30)
        os.close(self._orders)
        os.close(self._answers)
        wait_until(self._is_gone, "all processes of the browser are gone")
        shutil.rmtree(self._home)

    def _send(self, method: str, session: str | None, parameters: dict[str, Any]) -> int:
        """Send a request; return the number by which its answer is recognised."""
        number = next(self._numbers)
        request: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if session:
            request["sessionId"] = session
        with contextlib.suppress(BrokenPipeError):  # the caller finds no answer
            os.write(self._orders, json.dumps(request).encode() + b"\0")
        return number

    def _next(self, end: float) -> bytes:
        """Return the browser's next message, which is an answer or an event."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._answers, selectors.EVENT_READ)
            while b"\0" not in self._buffer:
                ready = selector.select(max(0.0, end - time.monotonic()))
                read = os.read(self._answers, 1 << 20) if ready else b""
                assert read, f"the browser does not answer:\n{(self._home / 'log').read_text()}"
                self._buffer += read
        message, _, self._buffer = self._buffer.partition(b"\0")
        return message

    def _is_gone(self) -> bool:
        """Return whether no process of the browser's group is alive; zombies count as dead."""
        for each in psutil.process_iter():
            with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
                is_of_it = os.getpgid(each.pid) == self.process.pid
                if is_of_it and each.status() != psutil.STATUS_ZOMBIE:
                    return False
        return True


class Tab:
    """One page in the browser, with its own width and colour scheme."""

    def __init__(self, browser: Chromium, url: str, width: int, height: int, dark: bool) -> None:
        self._browser = browser
        self._target = browser.call("Target.createTarget", url="about:blank")["targetId"]
        attached = browser.call("Target.attachToTarget", targetId=self._target, flatten=True)
        self._session = attached["sessionId"]
        self.call("Page.enable")
        self.call("Runtime.enable")
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        self.call(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}],
        )
        self.call("Page.addScriptToEvaluateOnNewDocument", source=WATCH_FOR_ERRORS)
        self.go(url)

    def __enter__(self) -> Tab:
        return self

    def __exit__(self, *_: object) -> None:
        self._browser.call("Target.closeTarget", targetId=self._target)

    def call(self, method: str, **parameters: Any) -> Any:
        return self._browser.call(method, self._session, **parameters)

    def go(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        ready = "document.readyState === 'complete' && location.href !== 'about:blank'"
        wait_until(lambda: self.ask(ready), f"{url} is loaded")

    def ask(self, expression: str) -> Any:
        """Return the value of a JavaScript expression in the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait_for(self, expression: str) -> None:
        wait_until(lambda: self.ask(expression), expression)

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def screenshot(self, path: Path, whole: bool = False) -> None:
        answer = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(answer["data"]))


#: A script that collects the page's errors, and whatever the page's security policy refuses.
WATCH_FOR_ERRORS = """
globalThis.refused = [];
addEventListener("securitypolicyviolation", event => refused.push(event.violatedDirective));
addEventListener("error", event => refused.push(event.message));
"""


def _above(descriptor: int) -> int:
    moved = fcntl.fcntl(descriptor, fcntl.F_DUPFD, 10)
    os.close(descriptor)
    return moved
