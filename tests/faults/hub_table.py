"""Prints what every fault of the Hub led to, for each endpoint: python -m tests.faults.hub_table

It runs tests/faults/test_hub.py, where each test notes the outcome that it saw.
"""

import sys
from pathlib import Path

import pytest


class Rows:
    """A pytest plugin: {(endpoint, fault): {what: outcome}} of the tests that passed."""

    def __init__(self):
        self.table: dict[tuple[str, str], dict[str, str]] = {}

    def pytest_runtest_logreport(self, report):
        if report.when != "call" or not report.passed:
            return
        for kind, row in report.user_properties:
            if kind == "row":
                endpoint, fault, outcome, what = row
                self.table.setdefault((endpoint, fault), {})[what] = outcome


def main() -> int:
    rows = Rows()
    failed = pytest.main(["-q", str(Path(__file__).with_name("test_hub.py")), *sys.argv[1:]], plugins=[rows])
    print("\n| endpoint | fault | outcome |\n|---|---|---|")
    for (endpoint, fault), seen in rows.table.items():
        outcomes: dict[str, list[str]] = {}
        for what, outcome in seen.items():
            outcomes.setdefault(outcome, []).append(what)
        text = "; ".join(f"{outcome} ({', '.join(of)})" for outcome, of in outcomes.items())
        print(f"| {endpoint} | {fault} | {text} |")
    return failed


if __name__ == "__main__":
    sys.exit(main())
