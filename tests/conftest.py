"""Settings for every test."""

from hypothesis import settings

# the same examples each time, on machines of any speed: a failure is the change's, not the dice's
settings.register_profile("ffnfold", deadline=None, derandomize=True, database=None)
settings.load_profile("ffnfold")
