"""What is logged: who and why, and neither tokens nor what stands in a pod's environment."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from cotenant.logs import configure
from cotenant.standins.api_rules import PODS
from cotenant.standins.api_server import ApiServer
from tests.builders import a_node, a_pod
from tests.device_plugin.node import Node, container_grant, granted, pod_spec
from tests.extender.running import Running, add, bind_args, call, eventually, filter_args

TOKEN = "token-4f61b0"
SECRET = "swordfish-8d1f"


@pytest.fixture
def printed(capfd: pytest.CaptureFixture[str]) -> Iterator[pytest.CaptureFixture[str]]:
    """Log as the programs do, whatever the tests before have set up, and leave nothing of it to those after."""
    root, before = logging.getLogger(), structlog.get_config()
    handlers, level = root.handlers[:], root.level
    configure("test")
    structlog.configure(cache_logger_on_first_use=False)
    yield capfd
    structlog.configure(**before)
    root.handlers[:] = handlers
    root.setLevel(level)


def test_an_extender_logs_neither_its_token_nor_what_pods_are_told(
    tmp_path: Path, printed: pytest.CaptureFixture[str]
) -> None:
    with ApiServer(token=TOKEN) as api:
        add(api, a_node("n1").with_gpus(1, "10GiB"))
        with Running(api, tmp_path) as extender:
            api.faults.refuse(500, path=r"/binding$", times=2)
            for name, units, annotations in (("good", 8, {}), ("large", 80, {}), ("forged", 1, {"password": SECRET})):
                body = a_pod().named(name).asking(units).annotated(annotations).as_json()
                body["spec"]["containers"][0]["env"] = [{"name": "PASSWORD", "value": SECRET}]
                pod = api.create(PODS, body, "default")
                extender.post("/filter", filter_args(pod, "n1", "nowhere"))
                extender.post("/bind", bind_args(pod, "n1"))
                call(extender.other_address, "POST", "/admission/validate", {"request": pod})
            extender.post("/filter", b'{"Pod": {"metadata": "' + SECRET.encode() + b'"}}')
            call(extender.other_address, "GET", "/v1/pods", Authorization=f"Bearer {SECRET}")
            api.add_pod("around", spec={"nodeName": "n1", "containers": [{"name": SECRET}]}, annotations={})
            assert eventually(extender.ledger.holds)
    logged = "".join(printed.readouterr())
    # something is logged: the Binding that was refused twice
    assert "binding in doubt" in logged
    assert SECRET not in logged
    assert TOKEN not in logged


def test_a_plugin_logs_neither_what_pods_are_told_nor_whole_pods(printed: pytest.CaptureFixture[str]) -> None:
    with Node() as node:
        good, bad = container_grant(gpus=[0]), container_grant(gpus=[1])
        for name, grant, annotations in (("good", good, granted(good)), ("bad", bad, {"password": SECRET})):
            spec = pod_spec(grant)
            spec["containers"][0]["env"].append({"name": "PASSWORD", "value": SECRET})
            node.settled(node.add_pod(name, annotations=annotations, spec=spec))
    logged = "".join(printed.readouterr())
    assert "allocate.answered" in logged
    assert "has no grant" in logged
    assert SECRET not in logged
