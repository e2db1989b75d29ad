"""Print a plan as JSON, in a new process: ``python -m splitlearn_core.testing.planning MODEL A B``."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Any

from splitlearn_core import SplitPlan, plan_split
from splitlearn_core.plugins.host import stdout_for_data


def plan_as_json(plan: SplitPlan) -> dict[str, Any]:
    """Return a plan with all its tensors, in their order, as JSON values."""
    tensors = {
        str(part.component): [
            {"module_key": tensor.module_key, **asdict(tensor.info), "shape": list(tensor.info.shape)}
            for tensor in part.tensors
        ]
        for part in plan.components
    }
    return {"plan": plan.to_dict(), "tensors": tensors}


if __name__ == "__main__":
    # Output of the plugin's import would corrupt the JSON; another check reports it.
    with stdout_for_data():
        json.dump(plan_as_json(plan_split(sys.argv[1], (int(sys.argv[2]), int(sys.argv[3])))), sys.stdout)
