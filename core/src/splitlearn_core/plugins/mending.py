"""What to do about a plugin that does not work: who can mend it, and how to go on without it."""

from __future__ import annotations

from splitlearn_core.plugins.metadata import PluginEntry

#: A block-list of plugins: entry-point or distribution names.
BLOCK_VARIABLE = "SPLITLEARN_DISABLE_PLUGINS"


def mend_for(entry: PluginEntry, how: str = "") -> str:
    """Return the way out for those who have a plugin that is broken.

    Args:
        entry: The plugin's.
        how: What mends it, where that is known; by default what its installation suggests.
    """
    return f"{how or _mending(entry)}; or leave the plugin out: {BLOCK_VARIABLE}={entry.distribution}"


def _mending(entry: PluginEntry) -> str:
    """Say who mends it: whoever has a checkout of it, or else its authors, whose newer version may have done so."""
    if entry.editable:
        return f"mend it in {entry.origin}"
    if entry.is_local:
        return f"mend it where {entry.origin} was made, and install it again"
    if entry.origin:
        return f"report it to its authors ({entry.origin})"
    return f"pip install --upgrade {entry.distribution}, or report it to its authors"
