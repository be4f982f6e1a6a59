"""What admission has to do, as one table: the policies and the webhook are both held to it.

tests/admission runs it through the pure functions, e2e/test_admission.py through a real kube-apiserver with the
policies and with the webhook.
"""

from tests.admission.forgery import FORGED, NEARLY_FORGED, WRITES
from tests.admission.outcomes import Creation, Ready, ready
from tests.admission.pods import asking, pod
from tests.admission.readied import READY, UNTOUCHED
from tests.admission.refused import REFUSED, UNMUTATED_CREATIONS

__all__ = ["ATTACHED_CREATIONS", "CREATIONS", "UNMUTATED_CREATIONS", "WRITES"]

CREATIONS = [*READY, *UNTOUCHED, *REFUSED, *FORGED, *NEARLY_FORGED]

# In the attached layout any scheduler will do; all else holds.
ATTACHED_CREATIONS = [
    Creation("the default scheduler stays", pod(asking()), Ready([ready()], scheduler="default-scheduler")),
    Creation("any scheduler may be named", pod(asking(), schedulerName="mine"), Ready([ready()], scheduler="mine")),
    *(
        case
        for case in REFUSED
        if case.saying in {"a preset node", "no units", "NVIDIA_VISIBLE_DEVICES set by a literal"}
    ),
    *FORGED,
]
