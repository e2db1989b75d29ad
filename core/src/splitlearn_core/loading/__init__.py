"""From a name to components, in the order of the data: opening, planning, options, reads, components."""

from __future__ import annotations

from splitlearn_core.loading.components import load_all, load_components
from splitlearn_core.loading.importing import collection_paused, import_builders
from splitlearn_core.loading.naming import type_and_model
from splitlearn_core.loading.opening import BUNDLED, OpenModel, bundled_checkpoint, open_model
from splitlearn_core.loading.options import LoadOptions, check_device, check_options, choose_devices
from splitlearn_core.loading.origins import origins_of
from splitlearn_core.loading.planning import default_dtype, make_plan, refuse_misfit, wanted_keys
from splitlearn_core.loading.reads import memory_by_strategy, memory_needed

__all__ = [
    "BUNDLED",
    "LoadOptions",
    "OpenModel",
    "bundled_checkpoint",
    "check_device",
    "check_options",
    "choose_devices",
    "collection_paused",
    "default_dtype",
    "import_builders",
    "load_all",
    "load_components",
    "make_plan",
    "memory_by_strategy",
    "memory_needed",
    "open_model",
    "origins_of",
    "refuse_misfit",
    "type_and_model",
    "wanted_keys",
]
