"""Write plugins for tests as pip would install them; needs no torch."""

from __future__ import annotations

import importlib
from pathlib import Path


def write_plugin(
    folder: Path,
    model_type: str,
    source: str,
    *,
    distribution: str = "",
    version: str = "1.0",
    requires: str = "",
    plugin_api: str = "",
    module: str = "",
    group: str = "splitlearn.families",
) -> Path:
    """Write a plugin as pip would install it: a module and its metadata, in one folder.

    Put the folder on ``sys.path`` (or ``PYTHONPATH``) and it is discovered.

    Args:
        folder: Where to write; may hold several plugins.
        model_type: The entry point's name: the model type, or the name of a strategy.
        source: The text of the module with the hooks.
        distribution: Its name; by default ``splitlearn-`` and the model type.
        version: Its version.
        requires: The versions of core that it requires, for example ``>=0.1``.
        plugin_api: The plugin API that it declares.
        module: The module's name; by default derived from the distribution.
        group: The entry point's group; ``splitlearn.strategies`` for a package of a loading strategy.
    """
    distribution = distribution or f"splitlearn-{model_type}"
    module = module or distribution.replace("-", "_")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{module}.py").write_text(source)
    importlib.invalidate_caches()
    info = folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    lines = ["Metadata-Version: 2.1", f"Name: {distribution}", f"Version: {version}"]
    lines += [f"Requires-Dist: splitlearn-core{requires}"] if requires else []
    (info / "METADATA").write_text("\n".join(lines) + "\n")
    points = f"[{group}]\n{model_type} = {module}\n"
    points += f"[splitlearn.plugin_api]\nversion = {plugin_api}\n" if plugin_api else ""
    (info / "entry_points.txt").write_text(points)
    (info / "RECORD").write_text(f"{module}.py,,\n")
    return folder
