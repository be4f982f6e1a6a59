"""Read one pod as the API server has it now, where the watch may lag."""

from cotenant.cluster import Cluster, NotFound, writes
from cotenant.cluster.reading import answered
from cotenant.contract.pods import Pod, pod_decoder


def read(cluster: Cluster, *, namespace: str, name: str, uid: str, timeout: float) -> Pod | None:
    """Read the pod of that UID; None where it is gone, or another one of its name has come.

    Raises ClusterError where the API server does not answer within *timeout* seconds, or with something else.
    """
    try:
        pod = answered(pod_decoder, writes.get_pod(cluster, namespace=namespace, name=name, timeout=timeout))
    except NotFound:
        return None
    return pod if pod.uid == uid else None
