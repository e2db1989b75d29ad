"""A component that runs elsewhere, used like a local one."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import nn
from transformers import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

from splitlearn_core.build.bundles import bundled, passed_on, taken_apart
from splitlearn_core.build.forward_arguments import RECORDINGS, mask_for_layers, named_cache
from splitlearn_core.build.kv_cache import (
    PartCache,
    cached_rows,
)
from splitlearn_core.checkpoint.origin import Origin
from splitlearn_core.errors import ConfigurationError, UnexpectedArgumentError
from splitlearn_core.family import STATES, ModelFamily
from splitlearn_core.hosts.calls import Call, Upload, through
from splitlearn_core.hosts.carriers import Endpoint
from splitlearn_core.hosts.chains import Link
from splitlearn_core.hosts.client import JOURNAL_BYTES, Host, Patience
from splitlearn_core.hosts.facts import CACHE_KINDS, MODES, Facts
from splitlearn_core.hosts.holes import RemoteLayer, apply_around_holes, layers_without_values
from splitlearn_core.hosts.journals import RemoteSession
from splitlearn_core.hosts.mirrored_layers import MirroredLayer, mirrored_layers
from splitlearn_core.hosts.payload import library_versions
from splitlearn_core.hosts.protocol import TOKEN_VARIABLE
from splitlearn_core.hosts.training import OUTPUT
from splitlearn_core.hosts.tuning import Tuning, content_hash, has_adapter, refuse_ineffective, refuse_unfit, tuning_of
from splitlearn_core.plan.crossing import computed
from splitlearn_core.types import FLOAT_DTYPES, Component, LayerRange, kind_of
from splitlearn_core.wire_formats import WIRES

log = logging.getLogger(__name__)

_STATE_DIMENSIONS = 3
#: Sets of adapters that may alternate; the host may drop older ones.
_MAX_UPLOADS = 8
_DTYPES = {name: getattr(torch, name) for name in FLOAT_DTYPES}


def connect(
    url: str,
    *,
    token: str | None = None,
    wire: str = "raw",
    mode: str = "solo",
    max_tokens: int = 2048,
    wait: float = 60.0,
    reply_timeout: float = 300.0,
    journal_bytes: int = JOURNAL_BYTES,
    ca_file: str | os.PathLike[str] | None = None,
    chain: bool | None = None,
) -> RemoteComponent:
    """Connect to a component that a server runs.

    Args:
        url: ``http(s)://HOST:PORT/MODEL_ID`` of ``splitlearn serve``, or that of :func:`serve_socket`.
        token: The access token of the server; by default the value of ``SPLITLEARN_TOKEN``.
        wire: How hidden states and gradients are sent, both ways: lossless ``"raw"``, or ``"int8"`` or ``"int4"``
            with 8 or 4 bits for each value.
        mode: ``"solo"`` is bit-equal to the unsplit model. ``"packed"`` lets the server run steps of several sessions
            in one forward, which is faster if many generate at once; results are close to those of "solo", not equal.
        max_tokens: Tokens of one sequence for which the server reserves memory; a longer sequence asks for more.
        wait: Seconds to wait for a server that was reached before and has become unreachable.
        reply_timeout: Seconds for the reply to one step.
        journal_bytes: Bytes of inputs that each session keeps here, for being rebuilt after a restart of the server.
        ca_file: A file of certificates to trust, in place of the system's.
        chain: Whether its output goes directly to the server of the next component, with a copy to this process: by
            default, if both servers allow it. With True, an error if they do not; with False, never.

    Raises:
        ConfigurationError: An argument is invalid.
        RemoteError: The server cannot be reached, or refuses.
    """
    problems = [
        f"{name}={value!r} is not {' or '.join(map(repr, known))}"
        for name, value, known in (("wire", wire, WIRES), ("mode", mode, MODES), ("chain", chain, (None, True, False)))
        if value not in known
    ]
    problems += [
        f"{name}={value!r} is not {what}"
        for name, value, kind, least, what in (
            ("max_tokens", max_tokens, int, 1, "a whole number of 1 or more"),
            ("wait", wait, int | float, 0, "a number of seconds of 0 or more"),
            ("reply_timeout", reply_timeout, int | float, 1e-3, "a number of seconds of 0.001 or more"),
            ("journal_bytes", journal_bytes, int, 0, "a whole number of 0 or more"),
        )
        # A comparison with NaN is false.
        if not isinstance(value, kind) or isinstance(value, bool) or not value >= least
    ]
    if problems:
        raise ConfigurationError("; ".join(problems), hint="leave an argument out for its default")
    endpoint = Endpoint(
        url=url,
        # A token that was read from a file may end with a newline.
        token=(token if token is not None else os.environ.get(TOKEN_VARIABLE, "")).strip() or None,
        ca_file=None if ca_file is None else os.fspath(ca_file),
        reply_timeout=reply_timeout,
    )
    return RemoteComponent(Host(endpoint, Patience(wait, journal_bytes), wire, mode), max_tokens, chain)


class RemoteComponent(nn.Module):
    """A component without weights, whose forward runs at a host. See :func:`connect`.

    It is used like a component: called, with :meth:`new_cache`, and in ``SplitCausalLM``. Any thread may
    call it; each cache is one session at the host, for one caller at a time.
    """

    def __init__(self, host: Host, max_tokens: int, chain: bool | None = None) -> None:
        super().__init__()
        self.host = host
        self._max_tokens = max_tokens
        self._chain = chain
        #: The ways from its host to those of components that have followed it.
        self._links: dict[Host, Link] = {}
        self._has_reported = False
        #: The prefix of the layers' names in the whole model; empty until their modules are known.
        self._prefix = ""
        #: PEFT's configurations, and the adapters as they were last sent, by the hash of their description.
        self._configs: Mapping[str, Any] = {}
        self._uploads: dict[str, Upload] = {}
        #: The number of calls in training mode.
        self._calls = 0
        facts = host.facts
        if kind_of(facts.component) is not Component.TRUNK:
            raise ConfigurationError(f"{host.url} runs a {facts.component}; only trunks are used remotely")
        #: ``SplitCausalLM`` compares these with the other components.
        self.config = self.decoder_config = SimpleNamespace(
            model_type=facts.model_type, hidden_size=facts.hidden_size, vocab_size=facts.vocab_size
        )
        self._crossing = facts.crossing_tensors()
        #: Stand-ins for the layers, by their number in the whole model.
        self.layer_modules = nn.ModuleDict({str(number): RemoteLayer(host.url) for number in range(*facts.layers[:2])})
        self.eval()

    @property
    def facts(self) -> Facts:
        """The host's description of the component."""
        return self.host.facts

    @property
    def url(self) -> str:
        return self.host.url

    @property
    def kind(self) -> Component:
        return kind_of(self.facts.component)

    @property
    def component(self) -> str:
        return self.facts.component

    @property
    def layer_range(self) -> LayerRange:
        return self.facts.layer_range

    @property
    def start_layer(self) -> int:
        return self.layer_range.start

    @property
    def end_layer(self) -> int:
        return self.layer_range.end

    @property
    def origin(self) -> Origin | None:
        return self.facts.origin_value()

    @property
    def dtype(self) -> torch.dtype:
        return cast("torch.dtype", _DTYPES[self.facts.dtype])

    def extra_repr(self) -> str:
        ways = [
            f"{'output goes on to' if link.name else 'output comes back, not on to'} {host.url}"
            for host, link in self._links.items()
        ]
        return ", ".join([f"{self.component}, layers {self.layer_range}, at {self.url}", *ways])

    def link_to(self, following: RemoteComponent, refusal: str = "") -> Link:
        """Return the way from this component's host to that of the next component; asked for and reported once.

        Args:
            following: The next component.
            refusal: Why its output must come back to this process; empty if it need not.

        Raises:
            ConfigurationError: The host does not send on, and ``chain=True`` demands it.
        """
        link = None if refusal else self._links.get(following.host)
        if link is None:
            link = Link(self.host, following.host, refusal or ("chain=False" if self._chain is False else ""))
            if link.name is None and self._chain:
                raise ConfigurationError(
                    f"the output of {self.component} cannot go on to {following.component}: {link.refusal}",
                    hint=f"it takes `splitlearn serve ... --next {following.url}` at {self.url}, and no wire= for "
                    "either; without chain=True, the output goes through this process",
                )
            if not refusal:
                # Another model of the same components may have no such reason.
                self._links[following.host] = link
            link.report(self.component, following.component)
        return link

    @property
    def is_adapted(self) -> bool:
        """Whether PEFT has adapted it."""
        return bool(self._configs)

    def report_differences(self, config: Any, device: torch.device) -> None:
        """Log, once, why results with this host may differ in the last bit from those of the unsplit model here.

        Args:
            config: The configuration of a component that runs here.
            device: The device of that component.
        """
        here = {
            "attention": str(getattr(config, "_attn_implementation", None) or "eager"),
            "versions": library_versions(),
            "threads": torch.get_num_threads(),
            "device": device.type,
        }
        differences = self.facts.last_bit_differences(here)
        if differences and not self._has_reported:
            self._has_reported = True
            log.warning(
                "Results with the %s at %s may differ in the last bit from those of the unsplit model here: %s",
                self.component,
                self.url,
                "; ".join(differences),
            )

    def close(self) -> None:
        """End the connections."""
        self.host.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> RemoteComponent:
        # Connections are thread-safe, so copies share them.
        other = memo[id(self)] = RemoteComponent(self.host, self._max_tokens, self._chain)
        other._links = self._links  # its own class
        other.layer_modules = copy.deepcopy(self.layer_modules, memo)
        other._prefix, other._configs = self._prefix, copy.deepcopy(self._configs, memo)  # its own class
        return other.train(self.training)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ConfigurationError(
            f"the {self.component} at {self.url} cannot be pickled: it is a connection",
            hint="connect in the process that uses it: connect(URL)",
        )

    def new_cache(self) -> PartCache:
        """Return an empty cache of this component's layers: a session, opened at its first step."""
        return PartCache(self._new_layers(), self.layer_range)

    def cache_view(self, whole: Cache) -> PartCache:
        """Return a view of this component's layers in a cache of the whole model; empty layers become a session.

        Raises:
            ConfigurationError: The layers were filled by a component that runs here, or are of another kind.
        """
        owned = self.layer_range
        view = PartCache.view(whole, owned)
        first = view.layers[0]
        if isinstance(first, MirroredLayer):
            if first.session.host is not self.host:
                raise ConfigurationError(
                    f"this cache belongs to a session at {first.session.host.url}, not at {self.url}",
                    hint="use an empty cache, or the split model that filled this one",
                )
            return view
        is_filled = bool(cached_rows(view))
        for layer in view.layers:
            if type(layer).__name__ not in CACHE_KINDS or is_filled:
                state = "filled" if is_filled else f"of the kind {type(layer).__name__}"
                raise ConfigurationError(
                    f"layers {owned} run at {self.url}, and this cache has layers for them that are {state}",
                    hint="use an empty DynamicCache(config=model.config), or leave past_key_values out; PEFT's prefix "
                    "tuning fills the keys and values of every layer, and is for components that are all here",
                )
        records_past = any(getattr(layer, "record_past", False) for layer in view.layers)
        view.layers[:] = self._new_layers()
        for layer in view.layers if records_past else ():
            cast("Any", layer).activate_past_recording()
        whole.layers[owned.start : owned.end] = view.layers
        return view

    def _new_layers(self) -> list[Any]:
        return mirrored_layers(self.facts, RemoteSession(self.host, self._max_tokens))

    def forward(
        self,
        hidden_states: torch.Tensor | None = None,
        *,
        attention_mask: Any = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> torch.Tensor | BaseModelOutputWithPast:
        """Run the component at its host; arguments and result are as for a trunk.

        Raises:
            ConfigurationError: Arguments that a trunk does not take.
            RemoteError: The host refused the step, or was unreachable for too long.
        """
        others: dict[str, torch.Tensor] = {}
        states: Any = hidden_states
        if self._crossing:
            left = self.layer_range.total - self.layer_range.start
            states, others = taken_apart(self._crossing, states, kwargs, left)
        hidden = self._checked_states(states)
        cache = self._checked_cache(named_cache(kwargs, past_key_values))
        arguments, tensors = self.arguments_of(
            {"attention_mask": attention_mask, "position_ids": position_ids, **kwargs}
        )

        tuning = self._tuning()
        parameters = {} if tuning is None else tuning.parameters
        crossing = {STATES: hidden, **others}
        learns = torch.is_grad_enabled() and any(
            tensor.requires_grad for tensor in (*crossing.values(), *parameters.values())
        )
        self._calls += self.training
        call = Call(
            host=self.host,
            component=self.component,
            arguments=arguments,
            tensors=tensors,
            training=self.training,
            autocast=_autocast_name(hidden.device),
            upload=self._upload_of(tuning),
            number=self._calls,
            computed=computed(self._crossing),
        )
        outputs = through(call, cache, crossing, parameters) if learns else call.forward(crossing, cache)[0]
        output = outputs.pop(OUTPUT)
        left_as_it_came = passed_on(self._crossing, others, len(self.layer_range))
        return cast("torch.Tensor | BaseModelOutputWithPast", bundled(output, {**left_as_it_came, **outputs}))

    def arguments_of(self, passed: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Separate the arguments of a forward, besides what crosses and the cache, into JSON values and tensors.

        Raises:
            ConfigurationError: Arguments that a trunk does not take.
        """
        mask = mask_for_layers(passed.get("attention_mask"), self.facts.layer_types, self.layer_range)
        return self._named({**passed, "attention_mask": mask})

    def open_layers(self, family: ModelFamily, config: Any, device: torch.device) -> None:
        """Replace the layers by the family's modules without values, for PEFT to adapt.

        Args:
            family, config: The family and configuration of the components in this process.
            device: The device for the modules that PEFT adds.
        """
        if self._prefix:
            return
        self.layer_modules = layers_without_values(
            family, config, self.component, self.layer_range, self.dtype, self.url
        )
        self._prefix = f"{family.base}.{family.layers}."
        self.layer_modules.train(self.training)
        if device.type != "cpu":
            self.to(device)

    def adapt(self, configs: Mapping[str, Any]) -> None:
        """Note PEFT's configurations, some of whose target modules may be in these layers.

        Raises:
            ConfigurationError: One of them needs the weights.
        """
        adapted = {name: config for name, config in configs.items() if has_adapter(self.layer_modules, name)}
        refuse_unfit(adapted, self.url)
        if self._prefix:
            refuse_ineffective(self.layer_modules, self._prefix, self.url)
        self._configs = configs

    def _tuning(self) -> Tuning | None:
        if not self._prefix:
            return None
        return tuning_of(self.layer_modules, self._prefix, self._configs, self.url, training=self.training)

    def _upload_of(self, tuning: Tuning | None) -> Upload | None:
        """Return the adapters to send; the same object until they change."""
        if tuning is None:
            return None
        description = content_hash(tuning.description, {})
        earlier = self._uploads.pop(description, None)
        upload = Upload(tuning, self.facts.max_payload, earlier)
        if earlier is not None and upload.names == earlier.names:
            upload = earlier
        self._uploads[description] = upload
        if len(self._uploads) > _MAX_UPLOADS:
            del self._uploads[next(iter(self._uploads))]
        return upload

    def _apply(self, fn: Any, recurse: bool = True) -> RemoteComponent:
        apply_around_holes(self, fn, lambda: cast("Any", nn.Module)._apply(self, fn, recurse))  # noqa: SLF001  # its own way of moving
        return self

    def set_experts_implementation(self, *args: Any, **kwargs: Any) -> None:
        """Raise: the host decides which implementation it runs."""
        self.set_attn_implementation()

    def set_attn_implementation(self, *args: Any, **kwargs: Any) -> None:
        """Raise: the host decides which implementation it runs."""
        raise ConfigurationError(
            f"the {self.component} runs with the kernels of its host ({self.facts.attention} attention)",
            hint="set it where the component is loaded",
        )

    def _checked_states(self, hidden: Any) -> torch.Tensor:
        width = self.facts.hidden_size
        dtype = torch.float32 if self.facts.crosses_in_float32 else self.dtype
        if (
            not isinstance(hidden, torch.Tensor)
            or (not self._crossing and (hidden.dim() != _STATE_DIMENSIONS or hidden.shape[-1] != width))
            or (hidden.dtype not in (dtype, self.dtype) and _autocast_name(hidden.device) is None)
        ):
            described = (
                f"{hidden.dtype} {list(hidden.shape)}" if isinstance(hidden, torch.Tensor) else type(hidden).__name__
            )
            raise ConfigurationError(
                f"hidden_states are {described}; this {self.component} takes {dtype} [batch, sequence, {width}]",
                hint="pass the output of the previous component unchanged",
            )
        return hidden

    def _checked_cache(self, cache: Any) -> PartCache | None:
        if cache is None:
            return None
        if not isinstance(cache, PartCache) or cache.layer_range != self.layer_range:
            cached = getattr(cache, "layer_range", "all layers")
            raise ConfigurationError(
                f"past_key_values is a cache of {cached}; this {self.component} runs layers {self.layer_range}",
                hint=f"use {self.component}.new_cache(); a cache of other layers would silently give wrong text",
            )
        first = cache.layers[0]
        if not isinstance(first, MirroredLayer) or first.session.host is not self.host:
            raise ConfigurationError(
                f"past_key_values is a cache of another {self.component} than the one at {self.url}",
                hint=f"use this component's own {self.component}.new_cache()",
            )
        return cache

    def _named(self, passed: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Separate arguments into JSON values and tensors."""
        arguments: dict[str, Any] = {}
        tensors: dict[str, torch.Tensor] = {}
        for name, value in passed.items():
            if value is None:
                continue
            if name not in self.facts.arguments and name not in RECORDINGS:
                raise UnexpectedArgumentError(
                    f"{self.component}.forward() got an unexpected keyword argument {name!r}",
                    hint=f"the {self.component} at {self.url} takes hidden_states, past_key_values, "
                    f"{', '.join(self.facts.arguments)}",
                )
            if isinstance(value, torch.Tensor):
                tensors[name] = value
            elif name == "attention_mask" and isinstance(value, Mapping):
                arguments["attention_mask_of"] = list(value)
                tensors.update({f"{name}.{kind}": mask for kind, mask in value.items() if mask is not None})
            elif isinstance(value, bool | int | float | str):
                arguments[name] = value
            else:
                raise ConfigurationError(
                    f"{name} is a {type(value).__name__}, which cannot be sent to {self.url}",
                    hint="pass a tensor, a number, a string, or None",
                )
        return arguments, tensors


def _autocast_name(device: torch.device) -> str | None:
    """Return torch's name of the autocast dtype, a setting of this thread that has to be sent along."""
    if not torch.is_autocast_enabled(device.type):
        return None
    return str(torch.get_autocast_dtype(device.type)).removeprefix("torch.")
