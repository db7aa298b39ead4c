"""In CI a parity or browser test that skips itself has failed: there, everything it needs must be installed.

What failed is told at once there, and not only at the end, which a run that is cut off does not reach.
"""

import os
import re
from collections.abc import Generator

import pytest

MUST_RUN = ("parity", "browser")


def _fail(report: pytest.TestReport | pytest.CollectReport) -> None:
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
    report.outcome = "failed"
    report.longrepr = f"skipped in CI, where parity and browser tests must run: {reason}"


def _in_ci() -> bool:
    return os.environ.get("CI") == "true"


class Teller:
    """Writes each failure when it happens."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        terminal = self.config.pluginmanager.get_plugin("terminalreporter")
        if report.failed and terminal:  # the workers of xdist have no terminal
            terminal.write_line(f"\n{report.nodeid} failed after {report.duration:.0f} s\n{report.longreprtext}")


def pytest_configure(config: pytest.Config) -> None:
    if _in_ci():
        config.pluginmanager.register(Teller(config))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    skipped = report.skipped and not hasattr(report, "wasxfail")
    if skipped and _in_ci() and any(item.get_closest_marker(name) for name in MUST_RUN):
        _fail(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    # A module that skips itself while it is imported has no marks yet; its text tells.
    marks = rf"\bmark\.({'|'.join(MUST_RUN)})\b"
    if report.skipped and _in_ci() and isinstance(collector, pytest.Module):
        must_run = re.search(marks, collector.path.read_text(encoding="utf-8"))
        if must_run:
            _fail(report)
    return report
