"""A plan as another process makes it: ``python -m splitlearn_core.testing.planning MODEL A B``."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Any

from splitlearn_core import SplitPlan, plan_split
from splitlearn_core.plugins.host import stdout_for_data


def told(plan: SplitPlan) -> dict[str, Any]:
    """Return all that a plan says, tensor by tensor and in its order, in values that JSON has."""
    tensors = {
        str(part.component): [
            {"module_key": tensor.module_key, **asdict(tensor.info), "shape": list(tensor.info.shape)}
            for tensor in part.tensors
        ]
        for part in plan.components
    }
    return {"plan": plan.to_dict(), "tensors": tensors}


if __name__ == "__main__":
    # What the plugin prints as it is imported is another check's matter.
    with stdout_for_data():
        json.dump(told(plan_split(sys.argv[1], (int(sys.argv[2]), int(sys.argv[3])))), sys.stdout)
