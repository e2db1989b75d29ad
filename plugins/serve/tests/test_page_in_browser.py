"""The status page in a real browser: Debian's chromium, driven through its own protocol over a pipe.

As a script it draws the picture of the documentation::

    python plugins/serve/tests/test_page_in_browser.py docs/status-page.png
"""

from __future__ import annotations

import base64
import fcntl
import itertools
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from serving import ScriptedLoader, StatusServer
from splitlearn_core import errors, preload
from splitlearn_core.manager.config import ModelConfig
from splitlearn_core.manager.resources import MemorySample, ResourceManager
from splitlearn_core.types import Component, Progress
from splitlearn_serve.tokens import Owner, Tokens

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions",
    "--disable-default-apps", "--no-proxy-server", "--hide-scrollbars", "--force-color-profile=srgb",
)  # fmt: skip
#: Seconds after which the page has failed rather than been slow.
LIMIT = 40.0
MIB, GIB = 2**20, 2**30
#: What would be a script, were it not text.
FOREIGN = "<img src=x onerror=window.hacked=1><script>window.hacked=1</script>"


class Browser:
    """A chromium of its own, with an empty profile, and one page in it."""

    def __init__(self, profile: Path) -> None:
        assert CHROMIUM is not None
        # Numbers above those that the browser itself wants them under.
        theirs_in, ours_out = (fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in os.pipe())
        ours_in, theirs_out = (fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in os.pipe())
        # The browser takes commands at 3 and answers at 4.
        start = (
            "import os, sys; [os.dup2(int(sys.argv[n - 2]), n) for n in (3, 4)]; os.execv(sys.argv[3], sys.argv[3:])"
        )
        arguments = [CHROMIUM, *FLAGS, "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"]
        self._process = subprocess.Popen(
            [sys.executable, "-c", start, str(theirs_in), str(theirs_out), *arguments],
            env={**os.environ, "HOME": str(profile)},
            pass_fds=(theirs_in, theirs_out),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._out, self._in = ours_out, ours_in
        self._numbers = itertools.count(1)
        self._buffer = b""
        self._session: str | None = None
        #: What the page wrote to the console, errors of the security policy among it.
        self.complaints: list[str] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def close(self) -> None:
        self._session = None
        self.send("Browser.close")
        self._process.wait(LIMIT)
        os.close(self._out)
        os.close(self._in)

    def send(self, method: str, **parameters: Any) -> Any:
        """Call a method of the protocol, and return what it answers."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != number:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def _receive(self) -> dict[str, Any]:
        deadline = time.monotonic() + 2 * LIMIT
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._in], [], [], max(0.0, deadline - time.monotonic()))
            block = os.read(self._in, 2**20) if ready else b""
            assert block, "the browser does not answer"
            self._buffer += block
        text, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        self._listen(message)
        return message

    def _listen(self, message: dict[str, Any]) -> None:
        given = message.get("params", {})
        if message.get("method") == "Log.entryAdded" and given["entry"]["level"] == "error":
            self.complaints.append(given["entry"]["text"])
        elif message.get("method") == "Network.loadingFailed" and given["type"] == "EventSource":
            self._events_ended = True
        elif message.get("method") == "Page.loadEventFired":
            self._loaded = True
        elif message.get("method") == "Runtime.exceptionThrown":
            self.complaints.append(given["exceptionDetails"]["exception"].get("description", "an exception"))

    def open(self, url: str) -> None:
        """Go to an address, and wait until what is there has been loaded."""
        self._loaded = False
        self.send("Page.navigate", url=url)
        self._events_ended = False
        while not self._loaded:
            self._receive()

    def wait_for_the_end_of_events(self) -> None:
        """Wait until the page has given up its stream of events."""
        while not self._events_ended:
            self._receive()

    def run(self, expression: str) -> Any:
        """Return the value of an expression in the page."""
        result = self.send("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, condition: str) -> None:
        """Wait until a condition holds; it is looked at whenever the page has changed."""
        met = self.run(
            f"""new Promise((resolve) => {{
                const met = () => {{ try {{ return Boolean({condition}); }} catch {{ return false; }} }};
                if (met()) return resolve(true);
                const end = (outcome) => {{ watcher.disconnect(); clearTimeout(timer); resolve(outcome); }};
                const watcher = new MutationObserver(() => met() && end(true));
                const everything = {{ subtree: true, childList: true, attributes: true, characterData: true }};
                watcher.observe(document, everything);
                const timer = setTimeout(() => end(false), {LIMIT * 1000});
            }})"""
        )
        assert met, f"{condition} does not hold; the page says: {self.run('document.body.innerText')}"

    def press(self, selector: str, key: str = "Enter") -> None:
        """Move the focus to an element, and press a key on it, as a keyboard does."""
        self.run(f"document.querySelector({json.dumps(selector)}).focus()")
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=13, text="\r")

    def click(self, expression: str) -> None:
        """Click where an element is, as a mouse does."""
        place = self.run(
            f"""(() => {{ const node = {expression}; node.scrollIntoView({{ block: "center" }});
                const box = node.getBoundingClientRect();
                return [box.x + box.width / 2, box.y + box.height / 2]; }})()"""
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button="left", clickCount=1)

    def resize(self, width: int, height: int, *, scale: float = 1, mobile: bool = False) -> None:
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=mobile
        )

    def prefer(self, **features: str) -> None:
        """Set what a person prefers: ``color_scheme="dark"``, say."""
        named = [{"name": f"prefers-{name.replace('_', '-')}", "value": value} for name, value in features.items()]
        self.send("Emulation.setEmulatedMedia", features=named)

    def screenshot(self, path: Path) -> None:
        picture = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=False)
        path.write_bytes(base64.b64decode(picture["data"]))


@contextmanager
def started(profile: Path) -> Iterator[Browser]:
    browser = Browser(profile)
    try:
        yield browser
    finally:
        browser.close()


def card(model_id: str) -> str:
    """Return the expression of a model's card."""
    is_it = f"(card) => card.querySelector('h3').textContent === {json.dumps(model_id)}"
    return f"[...document.querySelectorAll('.model')].find({is_it})"


def part(model_id: str, name: str) -> str:
    return f"{card(model_id)}.querySelector('[data-is=\"{name}\"]')"


def button(model_id: str, does: str) -> str:
    return f"{card(model_id)}.querySelector('[data-does=\"{does}\"]')"


def has(model_id: str, status: str) -> str:
    return f"{part(model_id, 'status')}.textContent === {json.dumps(status)}"


def config(model_id: str, component: str = "trunk", **values: Any) -> ModelConfig:
    given = {"model_type": "qwen2", "model_path": "/srv/models/qwen2-7b", "split_points": (4, 24), **values}
    return ModelConfig(model_id=model_id, component=component, **given)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("there is no chromium: the page was NOT tested in a browser (apt-get install chromium)")
    with started(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def loader() -> ScriptedLoader:
    return ScriptedLoader({"trunk": 400 * MIB, "bottom": 100 * MIB})


@pytest.fixture
def page(browser: Browser, loader: ScriptedLoader) -> Iterator[Callable[..., StatusServer]]:
    """Return a function that serves some models and opens the page."""
    with ExitStack() as stack:

        def page(*configs: ModelConfig, **options: Any) -> StatusServer:
            server = stack.enter_context(StatusServer(configs, **{"loader": loader, "min_residency": 0, **options}))
            browser.complaints.clear()
            browser.open(server.url)
            browser.run("window.marker = 'the same page'")
            return server

        browser.resize(1200, 900)
        browser.prefer(color_scheme="light")
        browser.send("Network.setBlockedURLs", urls=[])
        yield page
        browser.open("data:text/html,")


def test_a_load_is_seen_as_it_goes(browser: Browser, loader: ScriptedLoader, page: Callable[..., StatusServer]) -> None:
    """Both models are there; progress appears and ends in ready, by itself and without a reload."""
    loader.hold("trunk")
    server = page(config("bottom", "bottom"), config("trunk"))
    browser.wait(has("bottom", "ready"))
    browser.wait(has("trunk", "loading"))
    assert browser.run("document.querySelectorAll('.model').length") == 2

    loader.advance("trunk", Progress("reading", Component.TRUNK, 100 * MIB, 400 * MIB, "model-00002.safetensors"))
    browser.wait(f"{part('trunk', 'percent')}.textContent === '25 %'")
    assert browser.run(f"{card('trunk')}.querySelector('progress').value") == 0.25
    assert browser.run(f"{part('trunk', 'amount')}.textContent") == "100.0 MiB of 400.0 MiB"
    assert browser.run(f"{part('trunk', 'file')}.textContent") == "model-00002.safetensors"
    loader.advance("trunk", Progress("reading", Component.TRUNK, 300 * MIB, 400 * MIB, "model-00004.safetensors"))
    browser.wait(f"{part('trunk', 'percent')}.textContent === '75 %'")
    loader.finish("trunk")
    browser.wait(has("trunk", "ready"))

    browser.wait("document.querySelector('#said').textContent.includes('trunk: ready')")
    browser.wait("document.querySelector('#line').textContent === 'live'")
    assert browser.run(f"{part('trunk', 'loading')}.hidden") is True
    assert browser.run("window.marker") == "the same page"
    assert server.get("/api/statistics")["loads_succeeded"] == 2
    assert browser.complaints == []


def test_the_buttons_work(browser: Browser, loader: ScriptedLoader, page: Callable[..., StatusServer]) -> None:
    """Unload with the mouse, load with the keyboard, cancel, try again, and the focus is not lost."""
    loader.hold("held")
    server = page(config("trunk"), config("held", required=True))
    browser.wait(has("trunk", "ready"))
    browser.wait("document.querySelector('#health').textContent === 'not ready'")

    browser.click(button("trunk", "unload"))
    browser.wait(has("trunk", "not loaded"))
    assert [model["model_id"] for model in server.get("/api/models")["not_loaded"]] == ["trunk"]

    browser.run(f"{button('trunk', 'load')}.id = 'load-trunk'")
    browser.press("#load-trunk")
    browser.wait(has("trunk", "ready"))
    assert browser.run(f"document.activeElement === {card('trunk')}.querySelector('h3')") is True

    browser.click(button("held", "cancel"))
    browser.wait(f"{has('held', 'failed')} || {has('held', 'not loaded')}")
    browser.click(button("held", "load"))
    browser.wait(has("held", "loading"))
    loader.finish("held")
    browser.wait(has("held", "ready"))
    browser.wait("document.querySelector('#health').textContent === 'ready'")

    browser.click(button("trunk", "reload"))
    server.wait_until(lambda manager: manager.get_model_info("trunk").generation > 3)
    browser.click(f"{card('trunk')}.querySelector('summary')")
    browser.wait(f"{card('trunk')}.querySelectorAll('ol li').length > 5")
    assert browser.run("window.marker") == "the same page"
    assert browser.complaints == []


def test_foreign_text_is_shown_as_text(
    browser: Browser, loader: ScriptedLoader, page: Callable[..., StatusServer]
) -> None:
    """Markup in an id, a file name or an error is shown as it is, and does nothing."""
    name = FOREIGN.replace("/", "|")
    loader.hold(name)
    page(config(name))
    browser.wait(has(name, "loading"))
    loader.advance(name, Progress("reading", None, 1, 2, FOREIGN))
    browser.wait(f"{part(name, 'file')}.textContent === {json.dumps(FOREIGN)}")

    loader.fail(name, errors.InvalidCheckpointError(f"bad {FOREIGN}", hint=f"mend {FOREIGN}"))
    browser.wait(has(name, "failed"))

    assert browser.run(f"{part(name, 'error-text')}.textContent") == f"InvalidCheckpointError: bad {FOREIGN}"
    assert browser.run(f"{part(name, 'error-hint')}.textContent") == f"mend {FOREIGN}"
    browser.click(f"{card(name)}.querySelector('summary')")
    browser.wait(f"{card(name)}.querySelectorAll('ol li').length > 2")
    assert browser.run("document.querySelectorAll('main img, main script').length") == 0
    assert browser.run("window.hacked === undefined") is True
    # The button of an odd id reaches it, too.
    browser.click(button(name, "load"))
    browser.wait(has(name, "loading"))
    assert browser.complaints == []


def test_what_is_refused_is_said(browser: Browser, page: Callable[..., StatusServer]) -> None:
    """Holders keep a model: the page says how many, and offers not to wait for them."""
    server = page(config("trunk"), drain_timeout=0.3)
    browser.wait(has("trunk", "ready"))

    async def borrow(manager: Any) -> Any:
        lease = manager.lease("trunk")
        await lease.__aenter__()
        return lease

    lease = server.run(borrow)
    browser.click(button("trunk", "unload"))
    browser.wait(f"{part('trunk', 'refusal')}.textContent.includes('1 lease left')")
    assert browser.run(f"{part('trunk', 'refusal')}.getAttribute('role')") == "alert"
    assert server.get("/api/models/trunk")["status"] == "ready"
    server.run(lambda manager: lease.__aexit__(None, None, None))
    # The refusal itself was an answer of 409, which the browser notes.
    assert all("409" in complaint for complaint in browser.complaints)


def test_a_token_is_requested(browser: Browser, page: Callable[..., StatusServer]) -> None:
    """A button that needs one asks once, does what it was pressed for, and the others then need no other."""
    token = "t" * 32
    page(config("trunk"), tokens=Tokens({token: Owner("alice")}))
    browser.wait(has("trunk", "ready"))
    assert browser.run("document.querySelector('#access').hidden") is True
    browser.click(button("trunk", "unload"))
    browser.wait(f"{part('trunk', 'refusal')}.textContent.includes('token')")
    browser.wait("document.activeElement.id === 'token'")
    browser.run("document.querySelector('#token').value = 'wrong'")
    browser.click("document.querySelector('#use-token')")
    browser.wait(f"{part('trunk', 'refusal')}.textContent.includes('not one of')")
    browser.run(f"document.querySelector('#token').value = {token!r}")
    browser.press("#token")
    browser.wait(has("trunk", "not loaded"))
    assert browser.run("document.querySelector('#access').hidden") is True
    browser.click(button("trunk", "load"))
    browser.wait(has("trunk", "ready"))
    # It is nowhere in the page.
    assert token not in browser.run(
        "document.documentElement.outerHTML + location + document.querySelector('#token').value"
    )
    assert all("401" in complaint for complaint in browser.complaints)


def test_without_events_it_asks(browser: Browser, loader: ScriptedLoader, page: Callable[..., StatusServer]) -> None:
    """Where the stream is cut off, the page asks again and again, and says so."""
    browser.send("Network.setBlockedURLs", urls=["*/api/events"])
    loader.hold("trunk")
    page(config("trunk"))
    browser.wait(has("trunk", "loading"))
    browser.wait("document.querySelector('#line').textContent === 'asking every 2 s'")

    loader.finish("trunk")

    browser.wait(has("trunk", "ready"))
    assert browser.run("window.marker") == "the same page"


def test_a_hidden_page_sends_no_requests(
    browser: Browser, loader: ScriptedLoader, page: Callable[..., StatusServer]
) -> None:
    """A hidden page closes its stream; when it is visible again, it is up to date."""
    loader.hold("trunk")
    page(config("trunk"))
    browser.wait(has("trunk", "loading"))
    hide = "Object.defineProperty(document, 'hidden', {{ value: {}, configurable: true }}); "
    tell = "document.dispatchEvent(new Event('visibilitychange'))"
    browser.run(hide.format("true") + tell)

    browser.wait_for_the_end_of_events()
    loader.finish("trunk")
    browser.run(hide.format("false") + tell)
    browser.wait(has("trunk", "ready"))
    browser.wait("document.querySelector('#line').textContent === 'live'")


def test_the_end_of_the_server_is_seen(browser: Browser, page: Callable[..., StatusServer]) -> None:
    """The last data stay visible, and the line at the top says that the server does not answer."""
    server = page(config("trunk"))
    browser.wait(has("trunk", "ready"))

    server.end()

    browser.wait("document.querySelector('#line').textContent.startsWith('no answer for')")
    assert browser.run("document.querySelector('h3').textContent") == "trunk"


def test_it_is_for_everybody(browser: Browser, page: Callable[..., StatusServer]) -> None:
    """On a phone nothing is wider than the screen; in the dark it is dark; every control has a name of its own."""
    page(config("trunk"), config("a-very-long-name-" * 7, "bottom"))
    browser.wait(has("trunk", "ready"))
    light = browser.run("getComputedStyle(document.body).backgroundColor")

    browser.resize(340, 740, mobile=True)
    assert browser.run("document.scrollingElement.scrollWidth") <= 340
    browser.prefer(color_scheme="dark")
    dark = browser.run("getComputedStyle(document.body).backgroundColor")

    def brightness(colour: str) -> int:
        return sum(int(number) for number in colour[4:-1].split(","))

    assert brightness(light) > 600
    assert brightness(dark) < 120
    names = browser.run(
        "[...document.querySelectorAll('button')].filter((b) => !b.hidden).map((b) => b.getAttribute('aria-label'))"
    )
    assert "Unload: trunk" in names
    assert len(names) == len(set(names))
    assert browser.run("document.documentElement.lang") == "en"
    assert browser.run("document.querySelector('#said').getAttribute('aria-live')") == "polite"
    assert browser.complaints == []


def test_the_picture_can_be_drawn(browser: Browser, tmp_path: Path) -> None:
    """What the documentation shows is drawn from a page that runs, and is small enough to keep."""
    path = tmp_path / "page.png"

    draw(browser, path)

    assert path.read_bytes().startswith(b"\x89PNG")
    assert 20_000 < path.stat().st_size < 200_000


class FixedMemory(ResourceManager):
    """A machine of our choice, so that the picture is the same on every other."""

    def sample(self) -> MemorySample:
        return MemorySample({"host": 24 * GIB, "mapped": 16 * GIB}, {"host": 21 * GIB, "mapped": 16 * GIB})


def draw(browser: Browser, path: Path) -> None:
    """Draw a page on which much happens at once."""
    preload({"pytorch"})
    sizes = {"chat-bottom": 1490, "chat-trunk": 8800, "chat-top": 1410, "gpt2-bottom": 190, "llama-trunk": 7400}
    loader = ScriptedLoader({name: size * MIB for name, size in sizes.items()})
    loader.hold("chat-trunk", "chat-top", "gemma-trunk")
    configs = [
        config("chat-bottom", "bottom", required=True, pinned=True),
        config("chat-trunk", required=True),
        config("chat-top", "top", required=True),
        config("gpt2-bottom", "bottom", model_type="gpt2", model_path="/srv/models/gpt2", keep_alive="30m"),
        config("gemma-trunk", model_type="gemma", model_path="/srv/models/gemma-2b"),
        config("small-trunk", model_path="/srv/models/qwen2-0.5b", keep_alive="5m"),
    ]
    options = {"loader": loader, "resources": FixedMemory(), "max_workers": 4, "stall_after": 1.0}

    def in_status(status: str, *names: str) -> None:
        server.wait_until(lambda manager: all(manager.get_model_info(name).status == status for name in names))

    with StatusServer(configs, **options) as server, ExitStack() as leases:
        in_status("ready", "chat-bottom", "gpt2-bottom", "small-trunk")
        in_status("loading", "chat-trunk", "chat-top", "gemma-trunk")
        last = "model-00004-of-00004.safetensors"
        loader.advance("chat-top", Progress("reading", Component.TOP, 620 * MIB, 1410 * MIB, last))
        problem = "the tensors of /srv/models/gemma-2b are not those of a gemma model; 1 is wrong:\n  missing: {}"
        loader.fail(
            "gemma-trunk",
            errors.TensorMismatchError(
                problem.format("model.layers.7.mlp.up_proj.weight"),
                hint="do config.json and the weights belong together, and is it a causal model?",
            ),
        )
        in_status("failed", "gemma-trunk")
        assert server.request("DELETE", "/api/models/small-trunk").status == 200
        large = config("llama-trunk")
        assert server.request("POST", "/api/models", large.to_dict()).status == 202
        in_status("waiting", "llama-trunk")
        for _ in range(2):
            leases.enter_context(lent(server, "chat-bottom"))
        browser.resize(1240, 960)
        browser.prefer(color_scheme="light", reduced_motion="reduce")
        browser.open(server.url)
        for step in range(1, 14):
            # In steps that are seen one by one, so that there is a rate, and a time left.
            done = 400 * step
            file = f"model-0000{1 + step // 6}-of-00004.safetensors"
            loader.advance("chat-trunk", Progress("reading", Component.TRUNK, done * MIB, 8800 * MIB, file))
            browser.wait(f"{part('chat-trunk', 'percent')}.textContent === '{100 * done // 8800} %'")
        browser.wait(f"{part('chat-trunk', 'pace')}.textContent.includes('left')")
        browser.wait(f"!{part('chat-top', 'stalled')}.hidden")
        browser.screenshot(path)


@contextmanager
def lent(server: StatusServer, model_id: str) -> Iterator[None]:
    lease = server.run(lambda manager: _entered(manager.lease(model_id)))
    try:
        yield
    finally:
        server.run(lambda manager: lease.__aexit__(None, None, None))


async def _entered(lease: Any) -> Any:
    await lease.__aenter__()
    return lease


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder, started(Path(folder)) as chromium:
        draw(chromium, Path(sys.argv[1]))
