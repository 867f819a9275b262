"""Settings for every test."""

import pytest
from hypothesis import settings

# the same examples each time, on machines of any speed: a failure is the change's, not the dice's
settings.register_profile("ffnfold", deadline=None, derandomize=True, database=None)
settings.load_profile("ffnfold")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Nothing that a search measured before, here or in another test, is known to a test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
