"""AdmissionReview v1: what the API server sends, and what it must be able to read whatever it sent."""

import base64
import json
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from extender.admission import mutating_review, validating_review
from tests.admission import json_patch
from tests.admission.pods import SCHEDULER, Object, as_decoded, asking, container, injected, pod
from tests.admission.settings import SETTINGS

REVIEWS = [mutating_review, validating_review]


def review(new: Object | None, *, operation: str = "CREATE", subresource: str = "", **request: Any) -> bytes:
    """A review as kube-apiserver 1.36 sends it."""
    asked = {
        "uid": "705ab4f5-6393-11e8-b7cc-42010a800002",
        "kind": {"group": "", "version": "v1", "kind": "Pod"},
        "resource": {"group": "", "version": "v1", "resource": "pods"},
        "requestKind": {"group": "", "version": "v1", "kind": "Pod"},
        "requestResource": {"group": "", "version": "v1", "resource": "pods"},
        "subResource": subresource,
        "namespace": "default",
        "operation": operation,
        "userInfo": {"username": "alice", "uid": "1", "groups": ["system:authenticated"]},
        "object": new,
        "oldObject": None,
        "dryRun": False,
        "options": {"apiVersion": "meta.k8s.io/v1", "kind": "CreateOptions"},
        **request,
    }
    return json.dumps({"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": asked}).encode()


def response(body: bytes) -> Any:
    answer = json.loads(body)
    assert {"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview"} == {
        key: answer[key] for key in ("apiVersion", "kind")
    }
    return answer["response"]


def test_a_mutation_is_a_json_patch_in_base64() -> None:
    created = as_decoded(pod(asking()))
    answer = response(mutating_review(review(created), SETTINGS))
    assert (True, "JSONPatch") == (answer["allowed"], answer["patchType"])
    assert "705ab4f5-6393-11e8-b7cc-42010a800002" == answer["uid"]
    patched = json_patch.apply(created, json.loads(base64.b64decode(answer["patch"])))
    assert SCHEDULER == patched["spec"]["schedulerName"]
    assert injected() == patched["spec"]["containers"][0]["env"]


def test_the_profiles_that_have_policies_of_their_own_may_be_named() -> None:
    created = as_decoded(pod(asking(), schedulerName="interactive"))
    patch = response(mutating_review(review(created), SETTINGS))["patch"]
    ready = json_patch.apply(created, json.loads(base64.b64decode(patch)))
    profiles = msgspec.structs.replace(SETTINGS, profiles=frozenset({"interactive"}))

    assert [False, True] == [
        response(validating_review(review(ready), settings))["allowed"] for settings in (SETTINGS, profiles)
    ]


def test_a_pod_that_asks_nothing_is_let_pass_without_a_patch() -> None:
    answer = response(mutating_review(review(as_decoded(pod(container()))), SETTINGS))
    assert {"uid": answer["uid"], "allowed": True} == answer


def test_a_refusal_is_a_403_with_the_sentence() -> None:
    answer = response(validating_review(review(as_decoded(pod(asking(0), nodeName="n1"))), SETTINGS))
    assert answer["allowed"] is False
    assert (403, "Forbidden") == (answer["status"]["code"], answer["status"]["reason"])
    assert "spec.schedulerName is default-scheduler" in answer["status"]["message"]


def test_a_forged_grant_in_a_binding_is_refused() -> None:
    binding = {"metadata": {"annotations": {"cotenant.io/grant": "x"}}, "target": {"name": "n1"}}
    answer = response(validating_review(review(binding, subresource="binding"), SETTINGS))
    assert "annotation cotenant.io/grant is written only by" in answer["status"]["message"]


@pytest.mark.parametrize("answer", REVIEWS)
def test_an_operation_without_a_new_object_is_let_pass(answer: Any) -> None:
    assert response(answer(review(None, operation="DELETE", oldObject=pod(asking())), SETTINGS))["allowed"] is True


@pytest.mark.parametrize("answer", REVIEWS)
@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (b"", "the body is no AdmissionReview"),
        (b"{", "the body is no AdmissionReview"),
        (b"\xff\xfe", "the body is no AdmissionReview"),
        (b"[]", "the body is no AdmissionReview"),
        (b"[" * 100_000, "the body is no AdmissionReview"),
        (b'{"apiVersion":"admission.k8s.io/v1","kind":"AdmissionReview"}', "missing required field `request`"),
        (
            review(None).replace(b"admission.k8s.io/v1", b"admission.k8s.io/v1beta1"),
            "expected AdmissionReview of admission.k8s.io/v1, got AdmissionReview of admission.k8s.io/v1beta1",
        ),
        (review({"spec": {"containers": 3}}), "the pod cannot be read"),
        (review({"deep": "X"}).replace(b'"X"', b"[" * 100_000 + b"]" * 100_000), "maximum recursion depth"),
        (review({"name": "X"}).replace(b"X", b"\xff"), "can't decode byte 0xff"),
        (review({"spec": {"containers": [{"name": "\ud800"}]}}), ""),
    ],
)
def test_a_malformed_review_is_refused_with_a_sentence(answer: Any, body: bytes, sentence: str) -> None:
    answered = response(answer(body, SETTINGS))
    assert answered["allowed"] is False
    assert sentence in answered["status"]["message"]


@pytest.mark.parametrize("answer", REVIEWS)
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(body=st.one_of(st.binary(max_size=50), st.text(max_size=50).map(str.encode)))
def test_no_body_is_answered_with_anything_but_a_review(answer: Any, body: bytes) -> None:
    assert response(answer(body, SETTINGS))["allowed"] is False
