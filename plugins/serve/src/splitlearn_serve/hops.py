"""The next hosts of chains: the servers that this one sends the output of its trunks to.

Requests name none by its address: a server opens connections only to those that its operator has listed, and with the
token that the operator has for them.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import queue
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from splitlearn_core import ConnectionLostError, RemoteError
from splitlearn_core.extension import Frame, Kind

if TYPE_CHECKING:
    # They need torch, which is imported once the configuration is known to be valid.
    from splitlearn_core.extension import Endpoint, Host

log = logging.getLogger(__name__)

#: Why a host refuses this one -> the option that may help its operator.
_OPTIONS = {"access": "--next-token-file", "certificate": "--next-ca-file"}
#: Outputs that may be on their way at a time, each with a thread and a connection of its own.
MOST_ON_THE_WAY = 64


class Hops:
    """Sends outputs on. It is used in the manager's event loop.

    Args:
        endpoints: The hosts that outputs may go to.
    """

    def __init__(self, endpoints: Sequence[Endpoint] = ()) -> None:
        #: What users call a host: a name that says nothing about its address -> where it is.
        self._endpoints = {hashlib.sha256(each.url.encode()).hexdigest()[:16]: each for each in endpoints}
        self._hosts: dict[str, Host] = {}
        self._lock = threading.Lock()
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._threads = 0
        #: Outputs that are on their way.
        self._on_the_way = 0

    def __len__(self) -> int:
        return len(self._endpoints)

    async def link(self, frame: Frame) -> Frame:
        """Find the host that a request describes, and return its name.

        Raises:
            RemoteError: It is none of them; why, for each.
        """
        looks = (asyncio.to_thread(self._look, name, frame) for name in self._endpoints)
        answers = await asyncio.gather(*looks)
        name = next((name for name, why in zip(self._endpoints, answers, strict=True) if not why), None)
        if name is None:
            component = str(frame.meta.get("component"))[:50]
            raise RemoteError(
                f"this server sends on to no such {component}: {'; '.join(answers) or 'it was given no --next URL'}",
                code="no_next",
                hint=f"the operator of this server allows it with --next URL, the address of that {component}",
            )
        return Frame(Kind.LINKED, step=frame.step, meta={"link": name})

    async def send_on(self, name: str, step: Frame) -> bool | str:
        """Send a step to the next host; return True once that is done, or else the reason.

        What the next host answers is not waited for: the owner of the session asks it for the result.
        """
        if name not in self._endpoints:
            return "it does not know the next host any more"
        if self._on_the_way >= MOST_ON_THE_WAY:
            return f"{MOST_ON_THE_WAY} outputs are on their way already"
        loop = asyncio.get_running_loop()
        sent: asyncio.Future[bool | str] = loop.create_future()

        def report(outcome: bool | str) -> None:
            if not sent.done():
                sent.set_result(outcome)

        def done() -> None:
            self._on_the_way -= 1

        def work() -> None:
            try:
                self._send(name, step, lambda outcome: loop.call_soon_threadsafe(report, outcome))
            finally:
                loop.call_soon_threadsafe(done)

        self._on_the_way += 1
        if self._threads < self._on_the_way:
            self._threads += 1
            # A thread that waits for a silent host must not keep the process from ending.
            threading.Thread(target=self._run, name=f"send on {self._threads}", daemon=True).start()
        self._jobs.put(work)
        return await sent

    def close(self) -> None:
        """End the threads and connections that are idle."""
        for _ in range(self._threads):
            self._jobs.put(None)
        for host in self._hosts.values():
            host.close()

    # --- in threads -----------------------------------------------------------------------------------

    def _run(self) -> None:
        while (work := self._jobs.get()) is not None:
            try:
                work()
            except RuntimeError as error:
                # The event loop has ended meanwhile.
                log.debug("Nobody waits for an output that was sent on: %s", error)

    def _send(self, name: str, step: Frame, report: Callable[[Any], object]) -> None:
        try:
            host = self._host(name)
            pending = host.begin(step)
        except ConnectionLostError:
            try:
                # An idle connection may be dead while its host is running.
                pending = self._host(name).begin(step)
            except RemoteError as error:
                report(error.message)
                return
        except RemoteError as error:
            report(error.message)
            return
        report(True)
        try:
            reply = pending.reply()
        except ConnectionLostError:
            try:
                reply = host.exchange(step)
            except RemoteError as error:
                log.debug("An output was not sent on: %s", error.message)
                return
        except RemoteError as error:
            log.debug("An output was not sent on: %s", error.message)
            return
        if reply.kind is Kind.ERROR:
            log.debug("%s did not take an output: %s", host.url, reply.meta.get("message"))

    def _host(self, name: str) -> Host:
        from splitlearn_core.extension import Host, Patience

        known = self._hosts.get(name)
        if known is not None:
            return known
        # Without the lock: it may take long, and the outputs for others need not wait for it.
        made = Host(self._endpoints[name], Patience(wait=0))
        with self._lock:
            host = self._hosts.setdefault(name, made)
        if host is not made:
            made.close()
        return host

    def _look(self, name: str, frame: Frame) -> str:
        """Return why a host is not the one that is described; empty if it is."""
        from splitlearn_core.extension import Host, Patience

        url = self._endpoints[name].url
        try:
            # A new one: the component may be another than at the first connection.
            host = Host(self._endpoints[name], Patience(wait=0))
        except RemoteError as error:
            option = _OPTIONS.get(error.code)
            return error.message if option is None else f"{error.message} ({option})"
        facts, wanted = host.facts, frame.meta
        if facts.epoch == wanted.get("epoch"):
            with self._lock:
                earlier, self._hosts[name] = self._hosts.get(name), host
            if earlier is None:
                log.info("Outputs for %s are sent on to %s", facts.component, url)
            else:
                earlier.close()
            return ""
        host.close()
        if facts.component != wanted.get("component"):
            return f"{url} runs {facts.component}"
        if facts.digest != wanted.get("digest"):
            return f"{url} runs the {facts.component} of another model"
        return f"{url} is another server with this {facts.component}"
