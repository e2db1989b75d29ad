"""What variables of the environment say about plugins, the Hub and the network."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from urllib.parse import urlsplit

from splitlearn_core.doctor.findings import Finding, Level
from splitlearn_core.plugins.mending import BLOCK_VARIABLE
from splitlearn_core.plugins.registry import ALLOW_VARIABLE, registry

_NAME = "variables"
#: Truth, as the Hub's client reads it.
_TRUE = {"1", "ON", "YES", "TRUE"}
_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
_FOLDERS = ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE")
_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")


def check_variables() -> list[Finding]:
    """Say what is set that changes which plugins and which models are found."""
    found = [*lists(os.environ, registry().unknown_names()), *hub(os.environ)]
    return found or [Finding(_NAME, Level.OK, "none is set that hides plugins or models")]


def lists(environment: Mapping[str, str], unknown: Mapping[str, tuple[str, ...]]) -> Iterator[Finding]:
    """Say which lists of plugins are set, and what they name that is not there."""
    for variable, does in ((ALLOW_VARIABLE, "allows only"), (BLOCK_VARIABLE, "blocks")):
        value = environment.get(variable)
        if value is not None and (value.strip(" ,") or variable == ALLOW_VARIABLE):
            what = f"{variable} {does} {value.strip(' ,') or 'no plugin at all'}"
            yield Finding(_NAME, Level.NOTE, what, variable, f"unset {variable}, if other plugins are wanted")
        if variable in unknown:
            what = f"{variable} names {', '.join(unknown[variable])}: no such plugin is installed"
            mend = "correct the name or take it out: splitlearn plugins lists them, by model type and by package"
            # What is gone cannot be blocked, and that is as it was wanted; what cannot be allowed is missing.
            level = Level.NOTE if variable == BLOCK_VARIABLE else Level.WRONG
            yield Finding(_NAME, level, what, variable, mend)


def hub(environment: Mapping[str, str]) -> Iterator[Finding]:
    """Say what is set for the Hub and the network; no secret is repeated."""
    for variable in _OFFLINE:
        if environment.get(variable, "").upper() in _TRUE:
            what = f"{variable} keeps to the models that are here already"
            yield Finding(_NAME, Level.NOTE, what, variable, f"unset {variable} to download")
    endpoint = environment.get("HF_ENDPOINT")
    if endpoint:
        what = f"models come from {_without_secrets(endpoint)} and not from the Hugging Face Hub"
        yield Finding(_NAME, Level.NOTE, what, "HF_ENDPOINT", "unset HF_ENDPOINT, if that is not wanted")
    for variable in _FOLDERS:
        if environment.get(variable):
            yield Finding(_NAME, Level.NOTE, f"{variable} is {environment[variable]}", variable)
    for variable in (name for upper in _PROXIES for name in (upper, upper.lower())):
        if environment.get(variable):
            what = f"the network is reached through {_without_secrets(environment[variable])}"
            yield Finding(_NAME, Level.NOTE, what, variable, f"unset {variable}, if downloads fail")


def _without_secrets(url: str) -> str:
    """Return a URL without user and password."""
    try:
        parts = urlsplit(url if "//" in url else f"//{url}")
        return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="").geturl().removeprefix("//")
    except ValueError:
        return "what is no URL"
