"""A pytest plugin that runs each test in a process of its own, forked once everything is imported.

``make test-alone`` loads it. A test that passes only after another one fails here.
"""

from __future__ import annotations

import json
import os
import traceback
from typing import Any

import pytest
from _pytest.runner import runtestprotocol


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> bool:
    """Run a test, with the fixtures of its module and of the session, in a child, and report what it reports."""
    hook, config = item.ihook, item.config
    hook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _be_the_child(item, writer)
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        answer = stream.read()
    _, status = os.waitpid(child, 0)
    for data in json.loads(answer) if answer else [_death(item, status)]:
        report = data if isinstance(data, pytest.TestReport) else _report(config, data)
        hook.pytest_runtest_logreport(report=report)
    hook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def _be_the_child(item: pytest.Item, writer: int) -> None:
    try:
        reports = runtestprotocol(item, log=False, nextitem=None)
        data = [item.config.hook.pytest_report_to_serializable(config=item.config, report=report) for report in reports]
        with os.fdopen(writer, "wb") as stream:
            stream.write(json.dumps(data).encode())
    # Nothing of this process may go on in the child.
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def _report(config: pytest.Config, data: dict[str, Any]) -> pytest.TestReport:
    report = config.hook.pytest_report_from_serializable(config=config, data=data)
    assert isinstance(report, pytest.TestReport)
    return report


def _death(item: pytest.Item, status: int) -> pytest.TestReport:
    what = f"the test's process ended with exit code {os.waitstatus_to_exitcode(status)}"
    return pytest.TestReport(item.nodeid, item.location, {}, "failed", what, "call")
