"""A headless Chromium for the tests of pages, driven through a pipe by Chrome's DevTools protocol."""

import base64
import json
import os
import shutil
import subprocess
import tempfile

REST = """async element => {
  for (let before = null, now = ""; ; before = now) {
    element.scrollIntoView({block: "center"});
    now = JSON.stringify(element.getBoundingClientRect());
    if (before === now) return JSON.parse(now);
    await new Promise(done => setTimeout(done, 50));
  }
}"""  # of a page that pictures are still being decoded for, a box moves
NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome")


def find_browser():
    """The path of a Chromium, or None."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One page. What it logs, and what it asks the network for, is kept in `console` and `requests`."""

    def __init__(self, width=1280, height=900, dark=False):
        self.folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        to_page, self.writes = os.pipe()
        self.reads, from_page = os.pipe()
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--hide-scrollbars"]
        options += ["--force-color-profile=srgb", f"--user-data-dir={self.folder.name}", "about:blank"]

        def take_pipes():  # which the browser expects as numbers 3 and 4
            ends = os.dup(to_page), os.dup(from_page)
            os.dup2(ends[0], 3)
            os.dup2(ends[1], 4)

        self.process = subprocess.Popen(
            [find_browser(), *options], preexec_fn=take_pipes, close_fds=False, stderr=subprocess.DEVNULL
        )
        os.close(to_page)
        os.close(from_page)
        self.buffer, self.number, self.session = b"", 0, None
        self.console, self.requests, self.loaded = [], [], False
        [target] = [one for one in self.call("Target.getTargets")["targetInfos"] if one["type"] == "page"]
        attach = {"targetId": target["targetId"], "flatten": True}
        self.session = self.call("Target.attachToTarget", **attach)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        self.resize(width, height, dark)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.session = None
        self.call("Browser.close")
        self.process.wait(20)
        os.close(self.writes)
        os.close(self.reads)
        self.folder.cleanup()

    def call(self, method, **parameters):
        """The answer to a command of the protocol. Raises RuntimeError with the page's own words."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.writes, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.receive()
            if answer.get("id") == self.number:
                if "error" in answer:
                    raise RuntimeError(answer["error"]["message"])
                return answer["result"]

    def receive(self):
        """The next message; events are noted."""
        while b"\0" not in self.buffer:
            part = os.read(self.reads, 1 << 20)
            if not part:
                raise RuntimeError("the browser has ended")
            self.buffer += part
        text, _, self.buffer = self.buffer.partition(b"\0")
        message = json.loads(text)
        kind, values = message.get("method"), message.get("params", {})
        if kind == "Runtime.consoleAPICalled":
            self.console.append(" ".join(str(one.get("value")) for one in values["args"]))
        elif kind == "Runtime.exceptionThrown":
            details = values["exceptionDetails"]
            self.console.append(details.get("exception", {}).get("description", details["text"]))
        elif kind == "Log.entryAdded":
            self.console.append(values["entry"]["text"])
        elif kind == "Network.requestWillBeSent":
            self.requests.append(values["request"]["url"])
        elif kind == "Page.loadEventFired":
            self.loaded = True
        return message

    def open(self, address):
        """Load a page and wait until it is there."""
        self.loaded = False
        self.call("Page.navigate", url=address)
        while not self.loaded:
            self.receive()

    def run(self, script):
        """The value of an expression of JavaScript, awaited where it is a promise."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"]["exception"]["description"])
        return answer["result"].get("value")

    def press(self, key):
        """Press and release a key, such as "ArrowRight" or "p"."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key)

    def click(self, selector):
        """Click on the middle of an element, scrolled into view, once it has come to rest."""
        box = self.run(f"({REST})(document.querySelector({json.dumps(selector)}))")
        point = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2, "button": "left", "clickCount": 1}
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, **point)

    def resize(self, width, height, dark=False):
        """The size of the window, px, and whether its user likes it dark."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self, path, whole=False):
        """A PNG of what is seen, or of the whole page."""
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        with open(path, "wb") as file:
            file.write(base64.b64decode(shot["data"]))
