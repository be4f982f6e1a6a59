"""How hard Hypothesis tries, by HYPOTHESIS_PROFILE: thorough tries longer than the default; and where logs go."""

import os
import sys

import structlog
from hypothesis import HealthCheck, settings

# The machines that run this are shared: a deadline would fail on a neighbour's noise.
_CALM = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}

settings.register_profile("modest", max_examples=60, stateful_step_count=40, **_CALM)
settings.register_profile("thorough", max_examples=2_000, stateful_step_count=100, **_CALM)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "modest"))

# On stderr, as both programs do: what a thread of a test logs is no part of what a command prints meanwhile.
structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.__stderr__))
