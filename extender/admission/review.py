"""AdmissionReview v1 (admission.k8s.io): the JSON in which the API server asks a webhook, and the webhook answers."""

import base64
from collections.abc import Callable
from typing import Any

import msgspec

from extender.admission.mutate import mutate
from extender.admission.pod import PodError
from extender.admission.settings import Settings
from extender.admission.validate import Request, validate

API_VERSION = "admission.k8s.io/v1"
KIND = "AdmissionReview"


class _Resource(msgspec.Struct, frozen=True):
    resource: str


class _User(msgspec.Struct, frozen=True):
    username: str = ""


class _AdmissionRequest(msgspec.Struct, frozen=True, rename="camel"):
    uid: str
    operation: str
    resource: _Resource
    sub_resource: str = ""
    namespace: str = ""
    user_info: _User = _User()
    object: dict[str, Any] | None = None
    old_object: dict[str, Any] | None = None

    def asked(self) -> Request:
        return Request(
            operation=self.operation,
            resource=self.resource.resource,
            subresource=self.sub_resource,
            namespace=self.namespace,
            user=self.user_info.username,
            object=self.object,
            old=self.old_object,
        )


class _Review(msgspec.Struct, frozen=True, rename="camel"):
    api_version: str
    kind: str
    request: _AdmissionRequest


_review = msgspec.json.Decoder(_Review)


def mutating_review(body: bytes, settings: Settings) -> bytes:
    """Answer the API server's question how to change an object; a body that is no question is refused in the answer."""

    def answer(asked: _AdmissionRequest) -> dict[str, Any]:
        creates_pod = (asked.operation, asked.resource.resource, asked.sub_resource) == ("CREATE", "pods", "")
        operations = mutate(asked.object, settings) if creates_pod and asked.object is not None else []
        if not operations:
            return _allowed()
        patch = base64.b64encode(msgspec.json.encode(operations)).decode()
        return _allowed() | {"patchType": "JSONPatch", "patch": patch}

    return _answer(body, answer)


def validating_review(body: bytes, settings: Settings) -> bytes:
    """Answer the API server's question whether to let a write pass; a body that is no question is refused."""

    def answer(asked: _AdmissionRequest) -> dict[str, Any]:
        sentence = validate(asked.asked(), settings)
        return _allowed() if sentence is None else _refused(sentence)

    return _answer(body, answer)


def _answer(body: bytes, answer: Callable[[_AdmissionRequest], dict[str, Any]]) -> bytes:
    uid = ""
    try:
        review = _review.decode(body)
        uid = review.request.uid
        if (review.api_version, review.kind) != (API_VERSION, KIND):
            raise PodError(f"expected {KIND} of {API_VERSION}, got {review.kind} of {review.api_version}")
        response = answer(review.request)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        response = _refused(f"the body is no {KIND} of {API_VERSION}: {error}")
    except PodError as error:
        response = _refused(str(error))
    return msgspec.json.encode({"apiVersion": API_VERSION, "kind": KIND, "response": {"uid": uid, **response}})


def _allowed() -> dict[str, Any]:
    return {"allowed": True}


def _refused(sentence: str) -> dict[str, Any]:
    return {"allowed": False, "status": {"message": sentence, "code": 403, "reason": "Forbidden"}}
