"""pytest plugin of the tests' stages: every result is written at once, what passed in an earlier call is not run again,
and a worker that has lost its GPU gives way to a new one."""

import json
import os
from pathlib import Path

import pytest

from . import gpu_verdict

RESULTS = Path(os.environ["BIOPLAUS_RESULTS"])
STAGE = os.environ["BIOPLAUS_STAGE"]
_failed = False


def _write(config: pytest.Config, test: str, outcome: str, said: str) -> None:
    if not hasattr(config, "workerinput"):
        with RESULTS.open("a") as file:
            file.write(json.dumps({"stage": STAGE, "test": test, "outcome": outcome, "said": said[-4000:]}) + "\n")


class _Reports:
    def __init__(self, config: pytest.Config) -> None:
        self.config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        global _failed
        if report.failed:
            _failed = True
            _write(self.config, report.nodeid, "failed", report.longreprtext)
        elif report.when == "call" or report.skipped:
            _write(self.config, report.nodeid, report.outcome, "")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            _write(self.config, report.nodeid, "failed", report.longreprtext)

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logfinish(self) -> None:
        # An illegal access is every later test's error in that process; xdist starts another.
        if _failed and hasattr(self.config, "workerinput") and _lost():
            os._exit(1)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_Reports(config))


def _lost() -> bool:
    import torch

    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return torch.cuda.is_available()
    return False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The same for every worker, whenever it starts.
    found = gpu_verdict.lines(RESULTS, int(os.environ["BIOPLAUS_BEFORE"]))
    passed = {r["test"] for r in found if r["stage"] == STAGE and r.get("outcome") == "passed"}
    items[:] = [item for item in items if item.nodeid not in passed]
