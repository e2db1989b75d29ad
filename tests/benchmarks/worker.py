"""One measurement in a process of its own: ``worker.py MODULE JOB`` prints ``MODULE.work(JOB)`` as JSON."""

from __future__ import annotations

import importlib
import json
import sys


def main() -> None:
    module, job = sys.argv[1:]
    print(json.dumps(importlib.import_module(module).work(json.loads(job))))


if __name__ == "__main__":
    main()
