"""When the nominator looks at a pod again; what it does for pods of a whole extender is in test_verbs_http.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from cotenant.cluster import connect
from cotenant.contract.pods import Pod
from cotenant.contract.units import GIB
from extender.cluster.nominator import Nominator
from extender.ledger import Ledger
from extender.verbs.judge import Judge
from tests.builders import NAMES, a_node, a_pod
from tests.extender.running import PATIENCE, submit
from tests.extender.test_threads import request_of

if TYPE_CHECKING:
    from pathlib import Path

    from cotenant.standins.api_server import ApiServer


class Clock:
    """Stand still until a test moves it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_news_that_a_dead_watch_has_kept_for_15_s_still_bring_a_nomination(api: ApiServer, tmp_path: Path) -> None:
    ledger, clock = Ledger(NAMES, GIB), Clock()
    ledger.observe_node(a_node("n1").with_gpu("2GiB").build())
    with connect(api.kubeconfig(tmp_path / "kubeconfig")) as cluster:
        nominator = Nominator(cluster, ledger, Judge(ledger, NAMES, GIB, "binpack"), clock=clock)

        def look(name: str, units: int) -> None:
            pod = msgspec.convert(submit(api, a_pod().named(name).asking(units)), Pod)
            nominator.look(pod, request_of(pod), frozenset({"n1"}))

        def nominated(name: str) -> bool:
            pod = api.pod(name)
            return pod is not None and pod["status"].get("nominatedNodeName") == "n1"

        look("waits", 8)
        # 0.05 + 0.5 + 2 + 5 s after its attempt there is nothing new
        for turn, now in enumerate((0.05, 0.55, 2.55, 7.55)):
            clock.now = now
            # what is due first comes first: when this one is nominated, the other was looked at
            look(f"small-{turn}", 1)
            clock.now += 0.06
            assert api.wait_until(lambda turn=turn: nominated(f"small-{turn}"), PATIENCE)  # type: ignore[misc]
            api.delete_pod(f"small-{turn}", grace=0)
        assert not nominated("waits")

        ledger.observe_node(a_node("n1").with_gpu("10GiB").build())
        clock.now = 20.0
        look("wakes", 80)

        assert api.wait_until(lambda: nominated("waits"), PATIENCE)
        nominator.stop()
