"""Every no of Cotenant is one of these: in FailedNodes, Events, metrics labels, logs and explanations."""

from enum import StrEnum


class Reason(StrEnum):
    """Name why a pod, a node or a GPU was refused; the value is the metrics label, the sentence is for people."""

    # about the pod: no node could help
    BAD_REQUEST = "BadRequest"
    TWO_FAMILIES = "TwoFamilies"
    NO_ROOM_FOR_GRANT = "NoRoomForGrant"
    NAMESPACE_LIMIT = "NamespaceLimit"
    # about the node
    UNKNOWN_NODE = "UnknownNode"
    NO_INVENTORY = "NoInventory"
    BAD_INVENTORY = "BadInventory"
    UNIT_MISMATCH = "UnitMismatch"
    NOT_ADVERTISED = "NotAdvertised"
    PLUGIN_GONE = "PluginGone"
    # about its GPUs
    UNHEALTHY_GPU = "UnhealthyGPU"
    FENCED_GPU = "FencedGPU"
    NO_SHARED_GPU = "NoSharedGPU"
    NO_SUCH_GPU = "NoSuchGPU"
    ISOLATION_UNAVAILABLE = "IsolationUnavailable"
    MODE_CONFLICT = "ModeConflict"
    TOO_MANY_CLIENTS = "TooManyClients"
    NO_MIG_PROFILE = "NoMIGProfile"
    NO_MIG_ROOM = "NoMIGRoom"
    TOO_FEW_GPUS = "TooFewGPUs"
    TOO_LARGE = "TooLarge"
    NO_GPU_FITS = "NoGPUFits"
    NO_EMPTY_GPU = "NoEmptyGPU"
    # about the bind, or the moment
    CACHE_NOT_SYNCED = "CacheNotSynced"
    POD_GONE = "PodGone"
    BOUND_ELSEWHERE = "BoundElsewhere"
    UNSETTLED = "Unsettled"
    API_ERROR = "APIError"
    NOT_WRITER = "NotWriter"
    # about a grant, at the node
    NO_GRANT = "NoGrant"
    BAD_GRANT = "BadGrant"
    NOT_IDENTIFIED = "NotIdentified"
    WRONG_DEVICES = "WrongDevices"

    @property
    def sentence(self) -> str:
        """Say it in words that never change.

        kube-scheduler groups nodes by identical text, and a message that differs from the last one makes it try the pod
        again at once, for ever: numbers belong into explanations, not here.
        """
        return _SENTENCES[self]


_SENTENCES = {
    Reason.BAD_REQUEST: "the pod's GPU request cannot be read",
    Reason.TWO_FAMILIES: "a container asks for two families of GPU resources",
    Reason.NO_ROOM_FOR_GRANT: "the pod's annotations leave no room for a grant",
    Reason.NAMESPACE_LIMIT: "the limits of the pod's namespace do not allow it",
    Reason.UNKNOWN_NODE: "the node is not known to the extender yet",
    Reason.NO_INVENTORY: "the node publishes no GPU inventory",
    Reason.BAD_INVENTORY: "the node's GPU inventory cannot be read",
    Reason.UNIT_MISMATCH: "the node counts GPU memory in another unit than the extender",
    Reason.NOT_ADVERTISED: "the node's kubelet does not advertise what the pod asks",
    Reason.PLUGIN_GONE: "the node's device plugin is not serving",
    Reason.UNHEALTHY_GPU: "the GPUs that could take the pod are unhealthy",
    Reason.FENCED_GPU: "others than Cotenant's pods hold the GPUs that could take the pod",
    Reason.NO_SHARED_GPU: "no GPU of the node is shared by memory",
    Reason.NO_SUCH_GPU: "no GPU of the wished model or UUID",
    Reason.ISOLATION_UNAVAILABLE: "no GPU offers the isolation asked for",
    Reason.MODE_CONFLICT: "the GPU's mode conflicts with the pod",
    Reason.TOO_MANY_CLIENTS: "the GPUs that have room serve as many MPS clients as they can",
    Reason.NO_MIG_PROFILE: "no GPU offers the MIG profile",
    Reason.NO_MIG_ROOM: "no GPU has room for another instance of the MIG profile",
    Reason.TOO_FEW_GPUS: "the node has fewer GPUs than the pod asks for",
    Reason.TOO_LARGE: "the request is larger than any GPU",
    Reason.NO_GPU_FITS: "no single GPU has the requested memory free",
    Reason.NO_EMPTY_GPU: "no GPU is empty, and the pod wants one for itself",
    Reason.CACHE_NOT_SYNCED: "the extender has not read the cluster yet",
    Reason.POD_GONE: "the pod is gone",
    Reason.BOUND_ELSEWHERE: "the pod is bound already",
    Reason.UNSETTLED: "the outcome of an earlier bind is not known yet",
    Reason.API_ERROR: "the API server refused the binding",
    Reason.NOT_WRITER: "this extender is not the one that may bind",
    Reason.NO_GRANT: "the pod has no grant, so Cotenant's scheduler did not place it",
    Reason.BAD_GRANT: "the pod's grant cannot be read",
    Reason.NOT_IDENTIFIED: "the pod being admitted cannot be told for certain",
    Reason.WRONG_DEVICES: "the device ids are not of the granted GPU",
}
