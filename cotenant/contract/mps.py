"""What containers put under MPS on a GPU: how many at once, and as which users."""

import msgspec

# A container that no runAsUser is set for, whose user the image decides: all such are taken for one.
UNSET_USER = -1


class Clients(msgspec.Struct, frozen=True, gc=False):
    """Count the containers that use a GPU at once, and name the users that they run as.

    An MPS daemon serves one user at a time: the clients of another are queued until those of the first have ended (MPS
    documentation, "Architecture"; its server has the user's id).
    """

    count: int = 0
    users: frozenset[int] = frozenset()


NONE = Clients()
