"""The pure functions against the table that the policies are held to as well."""

from typing import Any

import pytest

from extender.admission import Request, Settings, mutate, validate
from tests.admission import json_patch
from tests.admission.cases import (
    ATTACHED_CREATIONS,
    BINDINGS,
    BOUND_ANNOTATIONS,
    CREATIONS,
    WRITES,
    Creation,
    Ready,
    Refused,
    Untouched,
    Write,
    seen,
)
from tests.admission.pods import Object, as_decoded, asking, pod

SECOND_SCHEDULER = Settings()
ATTACHED = Settings(scheduler=None)


def by_saying(case: Creation | Write) -> str:
    return case.saying


def admit(created: Object, user: str, settings: Settings) -> tuple[Object, str | None]:
    """Do what the API server does with a pod that is created; a second run of the mutation must find nothing to do."""
    mutated = json_patch.apply(created, mutate(created, settings))
    assert [] == mutate(mutated, settings)
    return mutated, validate(Request(operation="CREATE", resource="pods", user=user, object=mutated), settings)


def check_creation(case: Creation, settings: Settings) -> None:
    sent = as_decoded(case.pod)
    stored, sentence = admit(sent, case.user, settings)
    match case.outcome:
        case Refused(expected):
            assert sentence is not None
            assert expected in sentence
        case Untouched():
            assert sentence is None
            assert sent == stored
        case Ready() as outcome:
            assert sentence is None
            assert outcome == seen(stored)


@pytest.mark.parametrize("case", CREATIONS, ids=by_saying)
def test_a_created_pod_is_readied_left_alone_or_refused(case: Creation) -> None:
    check_creation(case, SECOND_SCHEDULER)


@pytest.mark.parametrize("case", ATTACHED_CREATIONS, ids=by_saying)
def test_in_the_attached_layout_any_scheduler_will_do(case: Creation) -> None:
    check_creation(case, ATTACHED)


@pytest.mark.parametrize("case", WRITES, ids=by_saying)
def test_only_the_extender_writes_grants(case: Write) -> None:
    resource, subresource, operation = case.route.value
    if case.route in BINDINGS:
        old = None
        new: Object = {"kind": "Binding", "metadata": {"annotations": case.changes}, "target": {"name": "n1"}}
    else:
        old = bound(BOUND_ANNOTATIONS)
        changed = {**BOUND_ANNOTATIONS, **case.changes}
        new = bound({key: value for key, value in changed.items() if value is not None})
    request = Request(
        operation=operation, resource=resource, subresource=subresource, user=case.user, object=new, old=old
    )
    assert (case.refused or None) == validate(request, SECOND_SCHEDULER)


def bound(annotations: dict[str, Any]) -> Object:
    return pod(asking(), annotations=annotations, nodeName="n1")
