"""Read one pod as the API server has it now, where the watch may lag."""

import msgspec

from cotenant.cluster import Cluster, NotFound, Unreachable, writes
from cotenant.cluster.nesting import decoded
from cotenant.contract.pods import Pod

_pod = msgspec.json.Decoder(Pod)


def read(cluster: Cluster, *, namespace: str, name: str, uid: str, timeout: float) -> Pod | None:
    """Read the pod of that UID; None where it is gone, or another one of its name has come.

    Raises ClusterError where the API server does not answer within *timeout* seconds, or with something else.
    """
    try:
        pod = decoded(_pod.decode, writes.get_pod(cluster, namespace=namespace, name=name, timeout=timeout))
    except NotFound:
        return None
    except msgspec.MsgspecError as error:
        raise Unreachable(f"the API server's answer is no Pod: {error}") from error
    return pod if pod.uid == uid else None
