"""How hard Hypothesis tries: HYPOTHESIS_PROFILE=thorough tries longer than the default."""

import os

from hypothesis import HealthCheck, settings

# The machines that run this are shared: a deadline would fail on a neighbour's noise.
_CALM = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}

settings.register_profile("modest", max_examples=60, stateful_step_count=40, **_CALM)
settings.register_profile("thorough", max_examples=2_000, stateful_step_count=100, **_CALM)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "modest"))
