"""Chains of hosts: each sends its output on to the next one, and a copy to the owner of the sessions.

The owner announces a step at every host, asks each but the first for the result, and sends the input to the first. A
host that executes a step with a *route* makes the next step of it, and sends that with a *pass*, which is good for the
steps of one session. The copies are what the owner's journals need, so that each session can be rebuilt alone. A step
that does not arrive is sent by the owner, under the same number and nonce: it is executed once.

A route has no address: it names one of the hosts that the operator of a server lets it send on to.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, cast

import torch

from splitlearn_core.build.forward_arguments import RECORDINGS
from splitlearn_core.errors import ConnectionLostError, ProtocolError, RemoteError
from splitlearn_core.family import STATES
from splitlearn_core.hosts.client import Host, Pending
from splitlearn_core.hosts.journals import RemoteSession
from splitlearn_core.hosts.protocol import Frame, Kind
from splitlearn_core.hosts.training import OUTPUT
from splitlearn_core.hosts.wires import wire_of
from splitlearn_core.wire_formats import RAW

if TYPE_CHECKING:
    from splitlearn_core.hosts.remote import RemoteComponent

log = logging.getLogger(__name__)

#: Seconds for a step to arrive at the next host, from when its owner asks for the result.
ARRIVAL = 10.0
#: Seconds after which a link that failed is used again: the first pause, and the longest.
_FIRST_PAUSE, _LONGEST_PAUSE = 5.0, 600.0
#: The entries of a route that belong into the meta of the step that is sent on.
_SENT_ON = ("pass", "nonce", "arguments", "changes", "next")
_MAX_NUMBER = 2**63 - 1


def onward(request: Frame, reply: Frame) -> tuple[str, Frame]:
    """Return the name of the next host, and the step for it.

    Args:
        request: A step with a route.
        reply: Its result.

    Raises:
        RemoteError: The route is not valid.
    """
    route = request.meta["next"]
    names = ("session", "step", "link", "pass", "nonce", "arguments")
    session, step, link, *rest = [route.get(name) for name in names] if isinstance(route, dict) else [None] * len(names)
    output = next((place for place, spec in enumerate(reply.tensors) if spec.name == OUTPUT), None)
    is_valid = all(type(number) is int and 0 < number <= _MAX_NUMBER for number in (session, step))
    if (
        not is_valid
        or output is None
        or not isinstance(link, str)
        or not all(isinstance(text, str) for text in rest[:-1])
        or not isinstance(rest[-1], dict)
        or wire_of(request) != RAW
    ):
        raise RemoteError("the route of a step names no session, step and host", code="bad_input")
    kept = [place for place, spec in enumerate(request.tensors) if spec.name != STATES]
    specs = (reply.tensors[output]._replace(name=STATES), *(request.tensors[place] for place in kept))
    buffers = [reply.buffers[output], *(request.buffers[place] for place in kept)]
    meta = {name: route[name] for name in _SENT_ON if name in route}
    return link, Frame(Kind.STEP, cast("int", session), cast("int", step), meta, specs, buffers)


class Link:
    """The way from a host to the next one.

    Args:
        before, after: The two hosts.
        refusal: Why the second is not even asked for; empty if it is.

    Attributes:
        name: What the first host calls the second; None if it does not send on to it.
        refusal: Why not.
        reason: Why an output did not arrive, the last time that one did not.
    """

    def __init__(self, before: Host, after: Host, refusal: str = "") -> None:
        self.before, self.after = before, after
        self.name: str | None = None
        self.refusal, self.reason = refusal, ""
        self._was_asked = False
        self._pause, self._resumes_at = _FIRST_PAUSE, 0.0
        if refusal:
            return
        if not before.facts.sends_on:
            self.refusal = f"{before.url} sends on to no other host"
        elif not after.facts.takes_over:
            self.refusal = f"{after.url} takes nothing from another host"
        elif (before.wire, after.wire) != (RAW, RAW):
            self.refusal = "outputs are sent on as they are, and wire= asks for fewer bits"
        else:
            self._ask()

    def _ask(self) -> None:
        self._was_asked = True
        facts = self.after.facts
        meta = {"epoch": facts.epoch, "component": facts.component, "digest": facts.digest}
        try:
            name = self.before.request_once(Frame(Kind.LINK, meta=meta)).meta.get("link")
            if not isinstance(name, str):
                raise ProtocolError(f"{self.before.url} named no next host", code="malformed")
            self.name = name
        except RemoteError as error:
            self.refusal = error.message

    @property
    def is_open(self) -> bool:
        """Whether outputs go this way at present."""
        return self.name is not None and time.monotonic() >= self._resumes_at

    def report(self, before: str, after: str) -> None:
        """Log which way the output of a component goes to the next one.

        Args:
            before, after: Their names.
        """
        if self.name is not None:
            log.info("The output of %s goes from %s on to %s at %s", before, self.before.url, after, self.after.url)
            return
        # Without a request for a chain, coming back through this process is no surprise.
        report = log.warning if self._was_asked else log.info
        report("The output of %s goes to %s through this process: %s", before, after, self.refusal)

    def worked(self) -> None:
        """Note that an output has arrived."""
        self._pause = _FIRST_PAUSE

    def failed(self, why: str) -> None:
        """Note that an output did not arrive: for a while, outputs go through this process."""
        self.reason, self._resumes_at = why, time.monotonic() + self._pause
        report = log.warning if self._pause == _FIRST_PAUSE else log.debug
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)
        report(
            "%s did not send its output on to %s (%s); outputs go through this process until it does",
            self.before.url,
            self.after.url,
            why,
        )


@dataclass(slots=True)
class Awaited:
    """The result of a step that the host before sends on."""

    link: Link
    session: RemoteSession
    before: RemoteSession
    nonce: str
    pending: Pending | None
    is_used: bool = False

    def result(self) -> Frame | None:
        """Return the result; None if the step did not arrive, and its owner has to send it.

        Raises:
            ConnectionLostError: The host was silent for longer than its user waits for it.
        """
        self.is_used = True
        why = self.before.sent_on
        if self.pending is None:
            return None
        if isinstance(why, str):
            self.link.failed(why)
            self.pending.drop()
            return None
        began = time.monotonic()
        try:
            reply = self.pending.reply()
        except ConnectionLostError as error:
            host = self.session.host
            if time.monotonic() - began > host.patience.wait:
                raise
            log.debug("A step that was sent on is sent again: %s", error.message)
            return None
        if reply.kind is Kind.RESULT:
            self.link.worked()
            return reply
        if reply.meta.get("code") == "not_arrived" and time.monotonic() - began > ARRIVAL / 2:
            self.link.failed("it did not arrive")
        return None


@contextlib.contextmanager
def announced(
    components: Sequence[RemoteComponent], hidden: Any, passed: Mapping[str, Any], caches: Sequence[Any]
) -> Iterator[None]:
    """Let the hosts of components that follow one another send their outputs on, for one step of each.

    Args:
        components: In order.
        hidden: The input of the first one.
        passed: The other arguments, which are those of each.
        caches: Their layers of the cache.
    """
    awaited: list[Awaited] = []
    try:
        if _is_plain(components, hidden, passed, caches):
            _announce(components, hidden.shape[0], passed, caches, awaited)
        yield
    finally:
        for item in awaited:
            if not item.is_used:
                # The step failed before it was this one's turn; whether it was sent on is unknown.
                item.session.awaited, item.session.is_uncertain = None, True
                if item.pending is not None:
                    item.pending.drop()
            item.before.route = None


def _is_plain(
    components: Sequence[RemoteComponent], hidden: Any, passed: Mapping[str, Any], caches: Sequence[Any]
) -> bool:
    """Whether this is a step of sessions without training, recordings or casts, which a host could not do."""
    return (
        isinstance(hidden, torch.Tensor)
        and None not in caches
        and not (torch.is_grad_enabled() and hidden.requires_grad)
        and not torch.is_autocast_enabled(hidden.device.type)
        and not any(passed.get(name) for name in RECORDINGS)
        and not any(component.training or component.is_adapted for component in components)
        and len({component.dtype for component in components}) == 1
    )


def _announce(
    components: Sequence[RemoteComponent],
    rows: int,
    passed: Mapping[str, Any],
    caches: Sequence[Any],
    awaited: list[Awaited],
) -> None:
    links = [before.link_to(after) for before, after in pairwise(components)]
    if not any(link.is_open for link in links):
        return
    named = [component.arguments_of(passed) for component in components]
    first = named[0][1]
    if any(
        tensors.keys() != first.keys() or any(tensors[name] is not first[name] for name in tensors)
        for _, tensors in named[1:]
    ):
        # Masks by type of layer: each host needs its own.
        return
    sessions = [cast("Any", cache.layers[0]).session for cache in caches]
    # From the last to the first: a route contains those after it.
    for place in range(len(links) - 1, -1, -1):
        link, session, before = links[place], sessions[place + 1], sessions[place]
        if not link.is_open:
            continue
        try:
            step = session.announce(rows)
            pending = session.collect(step, ARRIVAL)
        except RemoteError as error:
            # The step itself waits for a host that is away.
            log.debug("A step is not sent on to %s: %s", link.after.url, error.message)
            continue
        later = {} if session.route is None else {"next": session.route}
        before.route = {**step, "link": link.name, "arguments": named[place + 1][0], **later}
        session.awaited = Awaited(link, session, before, step["nonce"], pending)
        awaited.append(session.awaited)
