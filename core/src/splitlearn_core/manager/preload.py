"""Importing torch and transformers before an event loop starts.

``import torch`` and ``import transformers`` hold the GIL for hundreds of milliseconds at a time. In a
worker thread they stall the loop just the same. So a server imports them before it serves::

    preload({config.model_type for config in configs})
    asyncio.run(serve(configs))
"""

from __future__ import annotations

import gc
import importlib
import logging
import sys
from collections.abc import Iterable

from splitlearn_core.errors import PluginError
from splitlearn_core.loading.load import import_builders
from splitlearn_core.manager.config_checks import HUGGINGFACE, NOT_FAMILIES, PYTORCH
from splitlearn_core.plugins.registry import registry
from splitlearn_core.system_memory import return_large_blocks

log = logging.getLogger(__name__)

#: Modules that loading any component imports midway.
_BUILDING = (
    "splitlearn_core.build.assemble",
    "splitlearn_core.build.construction",
    "splitlearn_core.build.torch_state",
    "splitlearn_core.build.pruning",
    "splitlearn_core.checkpoint.checkpoint",
    "safetensors.torch",
    "huggingface_hub.file_download",
    "huggingface_hub.hf_api",
)
#: Names that transformers imports lazily.
_OF_TRANSFORMERS = ("GenerationConfig", "PreTrainedModel")
_OF_WHOLE_MODELS = ("AutoConfig", "AutoModelForCausalLM", "GenerationConfig", "PreTrainedModel")


def preload(model_types: Iterable[str], *, serving: bool = False) -> dict[str, PluginError]:
    """Import torch, transformers and the architectures of some families, in the calling thread.

    Takes seconds the first time, and nothing after that. Call it before the event loop starts; a
    load then imports nothing that takes long.

    The imports create hundreds of thousands of objects, and a garbage collection that visits
    all of them stops every thread for hundreds of milliseconds. One is due soon after the imports, so it
    is run here. Later ones come after every few loads, unless ``serving`` is given.

    Args:
        model_types: The model types that will be loaded: those of families, ``huggingface`` or
            ``pytorch``.
        serving: Set up the whole process for serving as well: ``gc.freeze()``, so that collections no
            longer visit any object that exists at this moment; and on Linux a fixed size above which
            freed blocks of memory go back to the system at once, so that unloading a model that
            was copied into memory gives back all of it.

    Returns:
        Model type -> why its plugin is unusable. The others are imported nevertheless, and loading
        such a model will fail with the same error.
    """
    modules_before = len(sys.modules)
    types = set(model_types)
    failures: dict[str, PluginError] = {}
    for model_type in sorted(types.difference(NOT_FAMILIES)):
        try:
            import_builders(registry().family(model_type))
        except PluginError as error:
            log.warning("Nothing was imported for %s: %s", model_type, error.message)
            failures[model_type] = error
    importlib.import_module("torch")
    if types - {PYTORCH}:
        transformers = importlib.import_module("transformers")
        for name in _OF_WHOLE_MODELS if HUGGINGFACE in types else _OF_TRANSFORMERS:
            getattr(transformers, name)
    for name in _BUILDING if types - {PYTORCH} else ():
        importlib.import_module(name)
    if gc.isenabled() and len(sys.modules) > modules_before:
        gc.collect()
    if serving:
        gc.freeze()
        return_large_blocks()
    return failures
