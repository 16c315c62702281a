"""What pytest loads in a run of mutants: the examples of the tests' own profile, but no search for a smaller one that fails."""

import pytest
from hypothesis import Phase, settings


@pytest.hookimpl(trylast=True)
def pytest_configure() -> None:
    settings.register_profile("mutants", parent=settings.get_profile("default"), phases=[Phase.explicit, Phase.generate])
    settings.load_profile("mutants")
