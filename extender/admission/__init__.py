"""Admission for clusters without MutatingAdmissionPolicy: what manifests/admission/policies does, as pure functions.

The extender serves `mutating_review` and `validating_review`; tests/admission/cases.py holds them and the policies to
one table. Two rules need no code: the API server lets ephemeral containers have no resources, and container names are
DNS labels, so that every annotation key made from one is valid.
"""

from extender.admission.mutate import mutate
from extender.admission.pod import PodError
from extender.admission.review import mutating_review, validating_review
from extender.admission.settings import Settings
from extender.admission.validate import Request, validate

__all__ = ["PodError", "Request", "Settings", "mutate", "mutating_review", "validate", "validating_review"]
