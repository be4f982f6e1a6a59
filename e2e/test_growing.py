"""What an autoscaler sees of a pod that waits because memory lies in pieces, and what `cotenant grow` changes in that.

The autoscaler itself is not here: it simulates kube-scheduler's own filters, and what these say a real kube-scheduler
writes into the pod's condition.
"""

from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from cotenant.cli.main import main
from cotenant.contract.units import GIB
from e2e import nodes, policies
from e2e.cluster import ControlPlane
from e2e.faults.load import pod
from e2e.processes import MissingProgramError
from e2e.programs import RunningExtender

SHAPE = nodes.Shape(gpus=2, gpu_bytes=10 * GIB)


def test_its_twin_fits_on_no_node_that_there_is_and_both_run_on_the_one_that_comes(tmp_path: Path) -> None:
    try:
        with ControlPlane(tmp_path / "control-plane") as cluster, policies.installed(cluster.api()):
            api = cluster.api()
            nodes.register(api, 2, SHAPE, prefix="there")
            with RunningExtender(cluster, tmp_path / "extender") as extender:
                cluster.start_scheduler(extender.scheduler_config())
                # each GPU has 4 of 10 left, each node 8
                for n in range(4):
                    api.create(pod(f"resident-{n}", 6, node=f"there-{n // 2}"))
                    api.bound(f"resident-{n}")
                api.create(pod("waits", 8))
                # the sums of both nodes would do, which is all that an autoscaler knows
                api.unschedulable("waits", "2 no single GPU has the requested memory free")

                flags = [f"--server={extender.serve}", f"--kubeconfig={cluster.kubeconfig()}"]
                made = CliRunner().invoke(main, ["grow", "waits", *flags])
                assert 0 == made.exit_code, made.output
                for one in yaml.safe_load_all(made.output):
                    api.create(one)
                api.unschedulable("grow-waits", "2 node(s) didn't match Pod's node affinity/selector")

                # as the autoscaler does now
                nodes.register(api, 1, SHAPE, prefix="new")
                assert ["new-0"] * 2 == [api.bound(name)["spec"]["nodeName"] for name in ("waits", "grow-waits")]
                done = CliRunner().invoke(main, ["grow", "waits", *flags])
                assert 1 == done.exit_code
                assert "another node is not what it waits for" in done.output
    except MissingProgramError as missing:
        pytest.skip(str(missing))
