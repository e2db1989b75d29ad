"""How the documentation is built: Sphinx with MyST. This is the only configuration of it; `make docs` builds."""

from __future__ import annotations

from typing import Any

from sphinx.pycode.parser import VariableCommentPicker

import splitlearn_core

project = "splitlearn"
copyright = "the authors of splitlearn"  # noqa: A001  # Sphinx reads this name
html_title = "splitlearn"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_click"]
exclude_patterns = ["requirements.txt"]
myst_heading_anchors = 3
#: `--split` is an option, and no dash.
smartquotes = False

html_theme = "furo"
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#2a5db0", "color-brand-content": "#2a5db0"},
    "dark_css_variables": {"color-brand-primary": "#8ab4f8", "color-brand-content": "#8ab4f8"},
}

autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False

# A signature is shown once, as the function has it; overloads are for type checkers.
VariableCommentPicker.is_overload = lambda *_: False

nitpicky = True
#: What signatures name and other projects document, which this build has no network to ask; and the names of types
#: that the text beside them explains.
nitpick_ignore_regex = [
    ("py:.*", r"(collections|contextlib|os|pathlib|pluggy|torch|transformers|types|typing)\..*"),
    ("py:.*", r"PluginManager.*"),  # pluggy's own docstrings of the markers
    ("py:class", r"AnyComponent|AnySplitModel|DType|Future|Host|LoadPlan|Module|Parts|Path|ProgressCallback"),
    ("py:class", r"ReportProgress|SessionLimits|.*_co|.*\.Place|.*\.QuantisedTensor"),
]


def keep_whole(_: Any, what: str, __: str, ___: Any, ____: Any, lines: list[str]) -> None:
    """Keep napoleon from taking what stands before a colon in the text of a field for a type."""
    if what in ("attribute", "data", "property"):
        lines[:0] = ["..", ""]  # an empty comment


def find_public(_: Any, env: Any, node: Any, contnode: Any) -> Any:
    """Resolve a name that is written as its own module knows it to the public name under which it is documented."""
    name = str(node.get("reftarget", "")).rpartition(".")[2]
    if node.get("refdomain") != "py" or name not in splitlearn_core.__all__:
        return None
    resolve = env.domains["py"].resolve_any_xref
    for home in ("splitlearn_core", "splitlearn_core.errors"):
        found = resolve(env, node["refdoc"], env.app.builder, f"{home}.{name}", node, contnode)
        if found:
            return found[0][1]
    return None


def setup(app: Any) -> None:
    """Connect the two functions above; the first has to come before napoleon, whose priority is 500."""
    app.connect("autodoc-process-docstring", keep_whole, priority=400)
    app.connect("missing-reference", find_public)
