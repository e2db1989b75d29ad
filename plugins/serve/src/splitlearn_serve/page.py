"""The status page: one HTML file, and a Content-Security-Policy that allows only its own script and style."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import dataclass
from functools import cache
from importlib import resources

_INLINE = re.compile(r"<(script|style)>(.*?)</\1>", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Page:
    """The page's text, and its Content-Security-Policy."""

    body: bytes
    policy: str


@cache
def status_page() -> Page:
    """Read the page, and allow its inline script and style by their hashes."""
    text = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    hashes: dict[str, list[str]] = {"script": [], "style": []}
    for kind, content in _INLINE.findall(text):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        hashes[kind].append(f"'sha256-{digest}'")
    policy = "; ".join(
        (
            "default-src 'none'",
            f"script-src {' '.join(hashes['script'])}",
            f"style-src {' '.join(hashes['style'])}",
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            # The script creates text nodes only; browsers with Trusted Types enforce that.
            "require-trusted-types-for 'script'",
        )
    )
    return Page(text.encode(), policy)
