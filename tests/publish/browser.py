"""Drives a headless Chromium over the DevTools protocol, on a pipe: no package is needed."""

import base64
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path

SANDBOX = [] if os.geteuid() else ["--no-sandbox"]  # Chromium refuses to run as root with it


class Browser:
    """One tab of a headless Chromium.

    Args:
        program: its path.
        width, height: of the page, in CSS pixels.
    """

    def __init__(self, program: str, width: int = 1280, height: int = 900) -> None:
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        to_browser, self._write = os.pipe()
        self._read, from_browser = os.pipe()

        def pipes() -> None:  # Chromium reads 3 and writes 4
            os.dup2(to_browser, 63), os.dup2(from_browser, 64)
            os.dup2(63, 3), os.dup2(64, 4)

        self._process = subprocess.Popen(
            [program, "--headless=new", "--remote-debugging-pipe", *SANDBOX, "--disable-gpu",
             "--no-first-run", "--disable-extensions", "--disable-background-networking",
             "--disable-component-update", "--disable-dev-shm-usage",
             f"--user-data-dir={self._folder.name}", f"--window-size={width},{height}",
             "about:blank"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, close_fds=False,
            preexec_fn=pipes,
        )  # fmt: skip
        os.close(to_browser)
        os.close(from_browser)
        self._pending = b""
        self._number = 0
        self._session: str | None = None
        self.requests: list[str] = []  # addresses that the page and its workers asked for
        self.problems: list[str] = []  # what the page wrote to the console as an error
        targets = self.send("Target.getTargets")["targetInfos"]
        target = next(t["targetId"] for t in targets if t["type"] == "page")
        attached = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")
        self.screen(width, height)

    def send(self, method: str, **parameters) -> dict:
        """Calls a method of the protocol and returns its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            found = self._next()
            if found.get("id") == self._number:
                assert "error" not in found, f"{method}: {found}"
                return found["result"]

    def _next(self) -> dict:
        while b"\0" not in self._pending:
            data = os.read(self._read, 1 << 20)
            assert data, "the browser has ended"
            self._pending += data
        line, self._pending = self._pending.split(b"\0", 1)
        found = json.loads(line)
        parameters = found.get("params", {})
        if found.get("method") == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])
        elif found.get("method") == "Log.entryAdded" and parameters["entry"]["level"] == "error":
            self.problems.append(parameters["entry"]["text"])
        elif found.get("method") == "Runtime.exceptionThrown":
            self.problems.append(str(parameters["exceptionDetails"]))
        return found

    def screen(self, width: int, height: int = 900, dark: bool = False) -> None:
        """Sets the size of the page in CSS pixels, and the colour scheme it is asked for."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height,
                  deviceScaleFactor=1, mobile=width < 600)  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, address: str) -> None:
        self.send("Page.navigate", url=address)

    def evaluate(self, expression: str):
        """The value of an expression of the page, awaited if it is a promise."""
        result = self.send(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, condition: str, seconds: float = 90):
        """Waits until an expression is true, and returns it."""
        end = time.monotonic() + seconds
        while True:
            # (While a page is loading there may be nothing to ask.)
            value = self.evaluate(f"(() => {{ try {{ return {condition} }} catch {{}} }})()")
            if value:
                return value
            assert time.monotonic() < end, (
                f"not within {seconds} s: {condition}; {self.problems}; "
                + self.evaluate("document.body.innerText")
            )
            time.sleep(0.1)

    def key(self, key: str, modifiers: int = 0) -> None:
        """Presses a key such as Tab or Enter."""
        codes = {"Tab": 9, "Enter": 13}
        common = {"key": key, "code": key, "modifiers": modifiers}
        common["windowsVirtualKeyCode"] = codes[key]
        text = {"text": "\r"} if key == "Enter" else {}
        self.send("Input.dispatchKeyEvent", type="keyDown", **common, **text)
        self.send("Input.dispatchKeyEvent", type="keyUp", **common)

    def type(self, selector: str, text: str) -> None:
        """Replaces what a field has by typing."""
        self.evaluate(f"document.querySelector({selector!r}).select()")
        self.evaluate(f"document.querySelector({selector!r}).focus()")
        self.send("Input.insertText", text=text)

    def picture(self, path: Path, full: bool = True) -> None:
        """Saves the page as a PNG."""
        data = self.send("Page.captureScreenshot", captureBeyondViewport=full)["data"]
        path.write_bytes(base64.b64decode(data))

    def close(self) -> None:
        os.close(self._write)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._read)
        self._folder.cleanup()
