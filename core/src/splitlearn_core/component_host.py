"""The interface of hosts: where the models of a manager run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from splitlearn_core.manager.config import ModelConfig
    from splitlearn_core.manager.loaders.loadable import LoadedModel, LoadPlan
    from splitlearn_core.types import ProgressCallback

#: Core's own hosts: name -> description.
CORE_HOSTS = {"inline": "the manager's own process", "process": "its own process"}


@runtime_checkable
class ComponentHost(Protocol):
    """Where models run: what ``ModelConfig(host=NAME)`` names. ``inline`` and ``process`` are such hosts, too.

    A package adds one by an entry point in the group ``splitlearn.hosts``: its name is that of the host, and its value
    a module, or an object in one, that has :meth:`load`::

        [project.entry-points."splitlearn.hosts"]
        ray = "splitlearn_ray:host"

    The module is imported when a model with that host is loaded. Other hosts than ``inline`` run trunks of families.
    What ``ModelConfig(host_options=...)`` says is the host's to check.

    A host whose models take memory of other machines says so by a second name, ``is_elsewhere = True``: the manager
    then admits them whatever they need, and ``plan.elsewhere`` has the bytes for the host's own admission.
    """

    def load(self, config: ModelConfig, plan: LoadPlan, report: ProgressCallback, threads: int | None) -> LoadedModel:
        """Load a model on this host, completely or not at all.

        It is called in a separate thread, and may take any time.

        Args:
            config: What to load.
            plan: The plan of the load, made in this process: its files are here. ``plan.after`` is the ``host`` of the
                earlier generation, if that has died: its sessions should continue, if the weights are the same.
            report: Call it at least ten times a second, in this thread. It raises to stop the load: end what has
                been started, and let the exception pass.
            threads: The number of torch's threads for a forward; None for torch's default in this process.

        Returns:
            The module that stands for the model, such as a :class:`RemoteComponent`, and with it, as ``host``, the
            ``ModelHost`` that reports its death and can end it; None if the model runs in this process.

        Raises:
            SplitLearnError: It cannot be loaded. Any other exception is reported as the host's failure.
        """
