"""The pure functions against the table that the policies are held to as well."""

from typing import Any

import pytest

from extender.admission import Request, Settings, mutate, validate
from tests.admission import json_patch
from tests.admission.cases import ATTACHED_CREATIONS, CREATIONS, UNMUTATED_CREATIONS, WRITES
from tests.admission.forgery import BINDINGS, BOUND_ANNOTATIONS, Write
from tests.admission.outcomes import Creation, Ready, Refused, Untouched, seen
from tests.admission.pods import Object, as_decoded, asking, pod
from tests.admission.settings import ATTACHED, SETTINGS


def by_saying(case: Creation | Write) -> str:
    return case.saying


def mutated(created: Object, settings: Settings) -> Object:
    """Patch the pod as the API server does; a second run must find nothing to do."""
    patched: Object = json_patch.apply(created, mutate(created, settings))
    assert [] == mutate(patched, settings)
    return patched


def check_creation(case: Creation, settings: Settings, *, mutating: bool = True) -> None:
    sent = as_decoded(case.pod)
    stored = mutated(sent, settings) if mutating else sent
    request = Request(operation="CREATE", resource="pods", user=case.user, object=stored)
    sentence = validate(request, settings)
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
    check_creation(case, SETTINGS)


@pytest.mark.parametrize("case", ATTACHED_CREATIONS, ids=by_saying)
def test_in_the_attached_layout_any_scheduler_will_do(case: Creation) -> None:
    check_creation(case, ATTACHED)


@pytest.mark.parametrize("case", UNMUTATED_CREATIONS, ids=by_saying)
def test_where_the_mutation_is_missing_nothing_gets_past(case: Creation) -> None:
    check_creation(case, SETTINGS, mutating=False)


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
    assert (case.refused or None) == validate(request, SETTINGS)


def bound(annotations: dict[str, Any]) -> Object:
    return pod(asking(), annotations=annotations, nodeName="n1")
