"""The part of kube-apiserver that asks admission webhooks about a pod, for the stand-in API server.

It follows apiserver/pkg/admission/plugin/webhook: mutating webhooks first, then validating ones, over HTTP on loopback
where the real one insists on HTTPS; failurePolicy is Fail.
"""

import base64
import copy
import http.client
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Literal
from urllib.parse import urlsplit

import msgspec

from cotenant.standins.api_rules import Json, Refused

_NAME = "pods.cotenant.io"
_TIMEOUT_SECONDS = 10.0
_OK = 200


class _Response(msgspec.Struct, frozen=True, rename="camel"):
    allowed: bool
    uid: str
    status: dict[str, Any] = {}
    patch: str = ""


class _Review(msgspec.Struct, frozen=True):
    response: _Response


_review = msgspec.json.Decoder(_Review)
_patch = msgspec.json.Decoder(list[dict[str, Any]])


class Webhooks:
    """Admit pods by the webhooks under *url*, ``mutate`` and ``validate``; use it as the API server's *admit*."""

    def __init__(self, url: str, *, user: str) -> None:
        """Ask in the name of *user*, who creates the pods."""
        self._url = url.rstrip("/")
        self._user = user

    def __call__(self, pod: Json) -> Json:
        """Return the pod as it shall be stored; raise Refused with what a user would read."""
        if patch := self._ask("mutate", pod).patch:
            pod = patched(pod, _patch.decode(base64.b64decode(patch)))
        answer = self._ask("validate", pod)
        if not answer.allowed:
            sentence = answer.status.get("message", "")
            raise Refused(403, "Forbidden", f'admission webhook "{_NAME}" denied the request: {sentence}')
        return pod

    def _ask(self, verb: Literal["mutate", "validate"], pod: Json) -> _Response:
        uid = str(uuid.uuid4())
        request = {
            "uid": uid,
            "operation": "CREATE",
            "resource": {"group": "", "version": "v1", "resource": "pods"},
            "namespace": pod["metadata"].get("namespace", ""),
            "userInfo": {"username": self._user},
            "object": pod,
        }
        body = msgspec.json.encode({"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": request})
        address = urlsplit(f"{self._url}/{verb}")
        connection = http.client.HTTPConnection(address.netloc, timeout=_TIMEOUT_SECONDS)
        try:
            connection.request("POST", address.path, body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            text = answer.read()
            if answer.status != _OK:
                raise http.client.HTTPException(f"status {answer.status}")
            response = _review.decode(text).response
        except (OSError, http.client.HTTPException, msgspec.MsgspecError) as error:
            raise Refused(500, "InternalError", f'failed calling webhook "{_NAME}": {error}') from error
        finally:
            connection.close()
        if response.uid != uid:
            raise Refused(500, "InternalError", f'failed calling webhook "{_NAME}": the answer is to another question')
        return response


def patched(document: Mapping[str, Any], operations: Sequence[Mapping[str, Any]]) -> Json:
    """Apply a JSON patch (RFC 6902), its operations add, replace and remove; raise Refused where it does not fit."""
    result: Json = copy.deepcopy(dict(document))
    for operation in operations:
        *parents, last = [part.replace("~1", "/").replace("~0", "~") for part in operation["path"].split("/")[1:]]
        target: Any = result
        try:
            for part in parents:
                target = target[int(part)] if isinstance(target, list) else target[part]
            _apply(operation, target, last)
        except (KeyError, IndexError, ValueError, TypeError) as error:
            raise Refused(
                500, "InternalError", f"the JSON patch does not apply: {operation['op']} {operation['path']}"
            ) from error
    return result


def _apply(operation: Mapping[str, Any], target: Any, last: str) -> None:
    if isinstance(target, list):
        index = len(target) if last == "-" else int(last)
        if not 0 <= index <= len(target) or (operation["op"] != "add" and index == len(target)):
            raise IndexError(last)
        target[index : index + (operation["op"] != "add")] = [operation["value"]] if operation["op"] != "remove" else []
    elif operation["op"] == "add" or (operation["op"] == "replace" and last in target):
        target[last] = copy.deepcopy(operation["value"])
    elif operation["op"] == "remove":
        del target[last]
    else:
        raise KeyError(operation["op"])
