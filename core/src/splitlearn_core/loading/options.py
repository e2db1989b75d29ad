"""How components are wanted, and whether this machine can give them so."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec

from splitlearn_core.checkpoint.checkpoint import MLX
from splitlearn_core.checkpoint.config import ADAPTER_CONFIG, CONFIG
from splitlearn_core.checkpoint.strategy import (
    check_strategy,
)
from splitlearn_core.errors import CheckpointError, ConfigurationError
from splitlearn_core.loading.opening import OpenModel
from splitlearn_core.plan.placement import AUTO, check_fit, place
from splitlearn_core.plan.splitplan import (
    SplitPlan,
)
from splitlearn_core.plugins.registry import registry
from splitlearn_core.types import Component

#: The part of a GPU's free memory that weights may take where nobody set a limit.
_USABLE = 0.9


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How the planned components are wanted."""

    #: Where they go, where ``device_map`` does not say otherwise.
    device: str = "cpu"
    strategy: str = "auto"
    attn_implementation: str | None = None
    #: Where each goes, or ``auto`` to work it out; see :mod:`splitlearn_core.plan.placement`.
    device_map: Mapping[Component, str] | str | None = None
    #: Device -> bytes that may be used of it; empty for no limits.
    max_memory: Mapping[str, int] = field(default_factory=dict)
    #: Refuse tensors that the model has no place for; otherwise they are a warning.
    strict: bool = False
    #: Called before each layer is built; it may raise to stop the load.
    on_layer: Callable[[], None] = lambda: None


def check_options(model: OpenModel, options: LoadOptions) -> None:
    """Refuse a device or strategy that does not exist, before anything is fetched or read for it.

    Raises:
        ConfigurationError: The name is no device or strategy, or this machine has no such device.
    """
    check_strategy(options.strategy, registry().strategies(model.family, options.strategy))
    if model.checkpoint.has_adapter and find_spec("peft") is None:
        raise ConfigurationError(
            f"an adapter lies with the weights of {model.name} ({ADAPTER_CONFIG}); to put it onto them needs peft",
            hint=f'pip install "splitlearn-core[peft]"; or move {ADAPTER_CONFIG} away for the model without it',
        )
    if model.checkpoint.quantization:
        if model.checkpoint.quantization == MLX:
            raise CheckpointError(
                f"{model.name} is quantised as {MLX} does it (group_size, bits in {CONFIG}), and packed for it alone",
                hint="write plain weights: mlx_lm.convert --hf-path DIR --mlx-path OUT --dequantize; "
                "or use the original checkpoint",
            )
        from splitlearn_core.build.whole import check_quantization

        check_quantization(model.name, model.checkpoint.quantization, model.checkpoint.config["quantization_config"])
    given = options.device_map.values() if isinstance(options.device_map, Mapping) else [options.device]
    check_devices(dict.fromkeys((*given, *options.max_memory)))


def check_devices(devices: Iterable[str]) -> None:
    """Refuse devices that this machine has not; raises ConfigurationError, naming all of them."""
    refusals = []
    for device in devices:
        try:
            check_device(device)
        except ConfigurationError as error:
            refusals.append(error)
    if len(refusals) > 1:
        raise ConfigurationError("; ".join(error.message for error in refusals), hint=refusals[0].hint)
    if refusals:
        raise refusals[0]


def check_device(device: str) -> None:
    """Refuse a device that this machine has not.

    Raises:
        ConfigurationError: There is no such device.
    """
    if device == "cpu":
        return
    import torch

    try:
        wanted = torch.device(device)
        if wanted.type == "meta":
            raise ConfigurationError("on the meta device nothing would be loaded", hint="use plan_split to look ahead")
        torch.empty(0, device=wanted)
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        # The first sentence: torch goes on about its own dispatcher.
        reason = str(error).splitlines()[0].partition(". ")[0][:200]
        gpus = torch.cuda.device_count()
        raise ConfigurationError(
            f"device {device!r} cannot be used: {reason}",
            hint=f"this machine has cpu{f' and {gpus} CUDA devices' if gpus else ', and no CUDA device'}",
        ) from error


def choose_devices(plan: SplitPlan, options: LoadOptions) -> dict[Component, str]:
    """Say where each planned component goes.

    Raises:
        InsufficientMemoryError: The limits that the caller set do not bear it.
    """
    if options.device_map == AUTO:
        return place(plan.components, options.max_memory or _free_devices())
    given = options.device_map if isinstance(options.device_map, Mapping) else {}
    devices = {part.component: given.get(part.component, options.device) for part in plan.components}
    check_fit(plan.components, devices, options.max_memory)
    return devices


def _free_devices() -> dict[str, int | None]:
    """Return what of each GPU is free, less a tenth for activations and caches; and the CPU, which a load checks."""
    import torch

    gpus = range(torch.cuda.device_count())
    free = {f"cuda:{gpu}": int(torch.cuda.mem_get_info(gpu)[0] * _USABLE) for gpu in gpus}
    return {**free, "cpu": None}
