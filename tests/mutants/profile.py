"""What pytest loads in a run of mutants: the tests' own examples, without a search for smaller ones that fail; and a clock."""

import os

import pytest
from hypothesis import Phase, settings


@pytest.hookimpl(trylast=True)
def pytest_configure() -> None:
    settings.register_profile("mutants", parent=settings.get_profile("default"), phases=[Phase.explicit, Phase.generate])
    settings.load_profile("mutants")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the seconds of the processor that the tests, and what they started, have taken."""
    times = os.times()
    terminalreporter.write_line(
        f"processor seconds: {times.user + times.system + times.children_user + times.children_system:.2f}"
    )
