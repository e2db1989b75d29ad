"""Checks of the plugin: its entry point, and no side effects of registering it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest

from splitlearn_core.plugins.registry import registry
from splitlearn_core.testing.conformance.base import Checks, explained
from splitlearn_core.testing.conformance.findings import Suspect, expect
from splitlearn_core.testing.conformance.isolation import claims, fresh_process


@explained
class Discovery(Checks):
    """Entry point, import budget, side effects."""

    @pytest.fixture(scope="class")
    @classmethod
    def registered(cls, only_this_plugin: None) -> dict[str, Any]:
        """Return the cache for the report of a new process that registers the plugin."""
        return {}

    def test_entry_point(self) -> None:
        """One distribution has an entry point of the family group that is named after the model type."""
        claimants = claims(self.model_type, self.distribution)
        labels = ", ".join(f"{entry.label} ({entry.module})" for entry in claimants) or "none"
        expect(
            len(claimants) == 1,
            f"one distribution must claim model type {self.model_type!r}, not {len(claimants)}: {labels}",
            Suspect("the entry point", f'group "splitlearn.families": {self.model_type} = "module"; then install again')
            if not claimants
            else Suspect("distribution", "name the tested one in the test class"),
        )
        family = registry().family(self.model_type)
        expect(
            family.model_type == self.model_type,
            f"the family is of {family.model_type!r}",
            Suspect("model_type", "it is the name of the entry point, and model_type in config.json"),
        )

    def test_import_budget(self, registered: dict[str, Any]) -> None:
        """Describing the family imports neither torch nor transformers."""
        heavy = self._registering(registered)["heavy"]
        expect(
            not heavy,
            f"registering the plugin imports {', '.join(heavy)}",
            Suspect("the plugin's imports", "import them inside functions; architecture is a name, not a class"),
        )

    def test_registration_has_no_side_effects(self, registered: dict[str, Any]) -> None:
        """Environment, path, warnings, threads, logging and output of the process are as they were before."""
        changed: Mapping[str, str] = self._registering(registered)["changed"]
        expect(
            not changed,
            "registering the plugin changes " + "; ".join(f"{what}: {how}" for what, how in changed.items()),
            Suspect("the plugin's module", "at import, it may only define things"),
        )

    def test_hooks_answer_alike(self, registered: dict[str, Any]) -> None:
        """A second registration returns the same values of the family."""
        differs = self._registering(registered)["differs"]
        expect(
            not differs,
            f"called twice, the plugin gives different values of {', '.join(differs)}",
            Suspect("hook splitlearn_model_families", "return a constant"),
        )

    def _registering(self, registered: dict[str, Any]) -> dict[str, Any]:
        if not registered:
            report = fresh_process("-m", "splitlearn_core.testing.registering", self.model_type)
            registered.update(json.loads(report))
        return registered
