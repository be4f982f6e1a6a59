"""Our admission policies on a cluster, from when they act until they are taken away."""

import json
from collections.abc import Iterator
from contextlib import contextmanager

from cotenant.contract.names import Names
from e2e import kustomize
from e2e.node import container, pod
from e2e.processes import wait_until
from e2e.rest import Api, ApiError, Object

_NAMES = Names()


@contextmanager
def installed(api: Api) -> Iterator[None]:
    """Apply the policies of the second-scheduler layout, wait until they act, and delete them in the end."""
    policies = list(kustomize.build(kustomize.MANIFESTS / "admission" / "policies"))
    for policy in policies:
        api.apply(json.dumps(policy))
    if not wait_until(lambda: _act(api), timeout_s=30):
        raise TimeoutError("the admission policies did not act within 30 s")
    yield
    for policy in policies:
        api.delete(policy["kind"], policy["metadata"]["name"], api_version=policy["apiVersion"])


def _act(api: Api) -> bool:
    """Whether all act: a pod of ours is made ready, which the validating one asks for, and a forged one is refused."""
    asking = pod("probe", container(limits={_NAMES.gpu_mem: 1}))
    forged = pod("probe", container(), annotations={_NAMES.grant: "{}"})
    ready = _tried(api, asking)
    return ready is not None and "cotenant-scheduler" == ready["spec"]["schedulerName"] and _tried(api, forged) is None


def _tried(api: Api, new: Object) -> Object | None:
    """Return the pod as it would be stored, None where it is refused: each policy begins to act at its own time."""
    try:
        return api.call("POST", "/api/v1/namespaces/default/pods", new, query={"dryRun": "All"})
    except ApiError:
        return None
