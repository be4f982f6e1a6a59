"""/v1 over HTTP: what people are shown of a running extender."""

from collections.abc import Callable

import pytest
import yaml

from cotenant.contract import grant as grants
from cotenant.contract.reasons import Reason
from cotenant.contract.units import GIB
from cotenant.standins.api_rules import NODES
from cotenant.standins.api_server import ApiServer
from extender.ledger import Stage
from tests.builders import NAMES, Json, PodBuilder, a_grant, a_node, a_pod, granted
from tests.extender.running import PATIENCE, Answer, Running, add, call, eventually, submit


def bound(api: ApiServer, extender: Running, pod: PodBuilder, node: str) -> Json:
    """Have the pod bound, and seen so."""
    sent = submit(api, pod)
    assert "" == extender.bind(sent, node)
    assert eventually(lambda: extender.stage(sent) is Stage.BOUND)
    return sent


def waiting(api: ApiServer, extender: Running, pod: PodBuilder) -> Json:
    """Have the pod wait, and seen so."""
    sent = submit(api, pod)
    assert eventually(lambda: extender.ledger.waiting(sent["metadata"]["uid"]))
    return sent


class TestNodes:
    """/v1/nodes shows every GPU and who holds what of it."""

    def test_a_gpu_is_shown_with_its_holders(self, api: ApiServer, extender: Running) -> None:
        bound(api, extender, a_pod().named("train").asking(6), "n1")

        page = extender.get("/v1/nodes").json

        assert ["n1", "n2"] == [node["node"] for node in page["items"]]
        first = page["items"][0]["gpus"][0]
        assert (10 * GIB, 6 * GIB, 4 * GIB) == (first["usableBytes"], first["heldBytes"], first["freeBytes"])
        assert [{"pod": "default/train", "bytes": 6 * GIB, "state": "bound"}] == first["holders"]
        totals = page["cluster"]
        # 4 GPUs of 10 GiB
        assert (4, 40 * GIB, 6 * GIB) == (totals["gpus"], totals["usableBytes"], totals["heldBytes"])
        assert 10 * GIB == totals["largestFreeBlockBytes"]

    def test_the_table_has_a_line_for_each_gpu_and_one_for_the_cluster(self, api: ApiServer, extender: Running) -> None:
        bound(api, extender, a_pod().named("train").asking(6), "n1")

        lines = extender.get("/v1/nodes?as=table").body.decode().splitlines()

        header = ["NODE", "GPU", "MODEL", "MODE", "ALLOCATED", "USED", "FREE", "PODS", "SLOTS", "HEALTH"]
        assert header == lines[0].split()
        assert lines[1].startswith("n1")
        assert "6Gi/10Gi (60%)" in lines[1]
        expected = "CLUSTER: 2 nodes, 4 GPUs, 6Gi/40Gi (15%), largest free block 10Gi, 0 pods waiting"
        assert expected == lines[5]

    def test_of_a_gpu_that_shrank_below_what_its_pods_hold_the_sum_has_all_that_they_hold(
        self, api: ApiServer, extender: Running
    ) -> None:
        pod = bound(api, extender, a_pod().asking(6), "n1")

        shrunk = a_node("n1").with_gpus(2, "5GiB").node_annotations
        api.patch(NODES, "n1", {"metadata": {"annotations": shrunk}})

        # 2 GPUs of 5 GiB and 2 of 10
        assert eventually(lambda: 30 * GIB == extender.get("/v1/nodes").json["cluster"]["usableBytes"])
        assert 6 * GIB == extender.get("/v1/nodes").json["cluster"]["heldBytes"]
        api.delete_pod(pod["metadata"]["name"], grace=0)

    def test_clients_of_mps_and_instances_of_mig_are_counted(self, api: ApiServer, extender: Running) -> None:
        served = a_node("m").with_gpu().under_mps(max_clients=48)
        static = (
            a_node("s").with_mig(static=["3g.20gb@4", "1g.5gb@0", "1g.5gb@1", "2g.10gb@2"]).with_shares("1g.5gb", 4)
        )
        add(api, served, static.with_ill_instances("2g.10gb@2"), a_node("d").with_mig().with_ill_places("3g.20gb@0"))
        assert eventually(lambda: len(extender.ledger.views()) == 5)
        for name, node, resource in (
            ("a", "m", NAMES.gpu_mem),
            ("b", "m", NAMES.gpu_mem),
            ("c", "s", NAMES.mig("1g.5gb")),
            ("e", "s", NAMES.mig("1g.5gb")),
            ("f", "s", NAMES.mig("1g.5gb")),
            ("g", "d", NAMES.mig("3g.20gb")),
        ):
            bound(api, extender, a_pod().named(name).asking(1, of=resource), node)

        slots = {line.split()[0]: line for line in extender.get("/v1/nodes?as=table").body.decode().splitlines()[1:-1]}
        gpus = {node["node"]: node["gpus"][0] for node in extender.get("/v1/nodes").json["items"]}

        assert " 2/48 clients " in slots["m"]
        assert " 2 x 1g.5gb (3/8 shares), 1 x 2g.10gb (1 unwell), 1 x 3g.20gb (1 free) " in slots["s"]
        assert " 2 x 3g.20gb (1 unwell) " in slots["d"]
        assert (2, 48) == (gpus["m"]["clients"], gpus["m"]["maxClients"])
        (first, second, ill, free) = gpus["s"]["slots"]
        assert ("default/c, default/f", 4, 2) == (first["pod"], first["shares"], first["held"])
        assert ("default/e", 1) == (second["pod"], second["held"])
        assert ("XID 1000", "") == (ill["detail"], free["detail"])
        csv = extender.get("/v1/nodes?as=csv&filter=mps").body.decode()
        assert "clients,max_clients,slots" in csv
        page = extender.get("/nodes/s").body.decode()
        assert "2 x 1g.5gb (3/8 shares), 1 x 2g.10gb (1 unwell), 1 x 3g.20gb (1 free)" in page
        assert "default/c, default/f: 1g.5gb on slice 0, 2 of 4 shares" in page
        assert "no pod: 2g.10gb on slices 2 to 3; no new pods: XID 1000" in page
        assert "2 GiB / 80 GiB<small>2/48 clients</small>" in extender.get("/").body.decode()

    def test_free_memory_of_a_mig_gpu_is_no_free_block(self, api: ApiServer, extender: Running) -> None:
        add(api, a_node("d").with_mig())
        assert eventually(lambda: extender.ledger.view("d"))
        # n1 has a whole GPU of 10 GiB free, the MIG GPU 40 GiB
        assert 10 * GIB == extender.get("/v1/nodes").json["cluster"]["largestFreeBlockBytes"]
        for name in ("n1", "n2"):
            api.store.delete(NODES, ("", name))
        assert eventually(lambda: not extender.ledger.view("n1") and not extender.ledger.view("n2"))
        assert "CLUSTER: 1 node, 1 GPU, 0/40Gi (0%), 0 pods waiting" in extender.get("/v1/nodes?as=table").body.decode()
        assert b"Largest free block" not in extender.get("/").body

    def test_an_instance_that_no_grant_explains_is_not_called_free(self, api: ApiServer, extender: Running) -> None:
        add(api, a_node("d").with_mig().with_unexplained("3g.20gb@0"))
        assert eventually(lambda: extender.ledger.view("d"))
        assert " 1 x 3g.20gb (1 unexplained) " in extender.get("/v1/nodes?as=table").body.decode()
        (slot,) = extender.get("/v1/nodes?filter=d").json["items"][0]["gpus"][0]["slots"]
        assert ("", "no grant explains it") == (slot["pod"], slot["detail"])
        assert "3g.20gb on slices 0 to 3; no new pods: no grant explains it" in extender.get("/nodes/d").body.decode()

    def test_pages_follow_each_other_without_gap_or_overlap(self, api: ApiServer, extender: Running) -> None:
        add(api, *(a_node(f"m{n}").with_gpu() for n in range(5)))
        assert eventually(lambda: len(extender.ledger.views()) == 7)
        seen, after = [], ""
        while True:
            page = extender.get(f"/v1/nodes?limit=3&continue={after}").json
            seen.append([node["node"] for node in page["items"]])
            after = page["continue"]
            if not after:
                break
        assert [["m0", "m1", "m2"], ["m3", "m4", "n1"], ["n2"]] == seen

    def test_nodes_without_an_inventory_are_left_out_unless_asked_for(self, api: ApiServer, extender: Running) -> None:
        add(api, a_node("cpu").without_inventory())
        assert eventually(lambda: extender.ledger.view("cpu"))
        shown = [{node["node"] for node in extender.get(f"/v1/nodes{query}").json["items"]} for query in ("", "?all=1")]
        assert [{"n1", "n2"}, {"n1", "n2", "cpu"}] == shown

    def test_a_filter_finds_names_models_and_problems(self, api: ApiServer, extender: Running) -> None:
        add(api, a_node("t4").with_gpu(model="Tesla T4"), a_node("gone").with_gpu().not_serving())
        assert eventually(lambda: len(extender.ledger.views()) == 4)
        for query, expected in (("tesla", ["t4"]), ("plugingone", ["gone"]), ("N2", ["n2"])):
            page = extender.get(f"/v1/nodes?filter={query}").json
            assert expected == [node["node"] for node in page["items"]]

    def test_yaml_says_what_json_does(self, extender: Running) -> None:
        for path in ("nodes", "pods", "namespaces", "mix"):
            assert extender.get(f"/v1/{path}").json == yaml.safe_load(extender.get(f"/v1/{path}?as=yaml").body)

    @pytest.mark.parametrize("path", ["nodes", "pods", "namespaces"])
    def test_a_page_of_csv_says_in_its_last_line_where_the_next_begins(
        self, api: ApiServer, extender: Running, path: str
    ) -> None:
        for namespace in ("a", "b"):
            bound(api, extender, a_pod().in_namespace(namespace).named(namespace).asking(1), "n1")
        whole = extender.get(f"/v1/{path}?as=csv").body.decode()
        after = extender.get(f"/v1/{path}?limit=1").json["continue"]
        first = extender.get(f"/v1/{path}?as=csv&limit=1").body.decode()
        rest = extender.get(f"/v1/{path}?as=csv&continue={after}").body.decode()
        header, _, rows = rest.partition("\n")
        assert "#" not in whole
        assert f"{whole.removesuffix(rows)}# continue {after}\n" == first
        assert whole.startswith(header)

    def test_csv_has_plain_bytes_and_no_formulas(self, api: ApiServer, extender: Running) -> None:
        add(api, a_node("m").with_gpu(model="=1+1"))
        assert eventually(lambda: extender.ledger.view("m"))
        line = extender.get("/v1/nodes?as=csv&filter=m").body.decode().splitlines()[1]
        assert f"m,0,GPU-m-0,'=1+1,time-slicing,{80 * GIB},0,{80 * GIB},0,healthy,,0,0,,,0" == line

    def test_a_name_cannot_move_the_cursor_of_a_terminal(self, api: ApiServer, extender: Running) -> None:
        add(api, a_node("m").with_gpu(model="T4\x1b[2J\nm2"))
        assert eventually(lambda: extender.ledger.view("m"))
        assert "T4?[2J?m2" in extender.get("/v1/nodes?as=table").body.decode()


class TestPods:
    """/v1/pods shows every pod of ours, and what is wrong with it."""

    def test_pods_are_shown_by_state(self, api: ApiServer, extender: Running) -> None:
        bound(api, extender, a_pod().named("train").asking(6), "n1")
        waiting(api, extender, a_pod().named("big").asking(11))
        around = submit(api, a_pod().named("around").asking(1).bound_to("n2"))
        assert eventually(lambda: extender.ledger.is_ungranted(around["metadata"]["uid"]))

        rows = {row["name"]: row for row in extender.get("/v1/pods").json["items"]}

        assert {"train": "bound", "big": "waiting", "around": "ungranted"} == {n: r["state"] for n, r in rows.items()}
        assert [{"index": 0, "uuid": "GPU-n1-0", "bytes": 6 * GIB}] == rows["train"]["gpus"]
        assert ("11 GiB", Reason.TOO_LARGE) == (rows["big"]["asks"], rows["big"]["reason"])
        assert f"0/2 nodes fit: 2 {Reason.TOO_LARGE.sentence}" == rows["big"]["sentence"]
        assert Reason.NO_GRANT.sentence == rows["around"]["sentence"]

    def test_a_pod_that_fits_and_waits_is_told_so(self, api: ApiServer, extender: Running) -> None:
        add(api, a_node("small").with_gpu("5GiB"))
        assert eventually(lambda: len(extender.ledger.views()) == 3)
        waiting(api, extender, a_pod().named("p").asking(8))
        (row,) = extender.get("/v1/pods?state=waiting").json["items"]
        assert row["sentence"].startswith("fits on 2 of 3 nodes: about to be scheduled, or something else holds it up")

    def test_a_pod_is_found_by_state_and_namespace(self, api: ApiServer, extender: Running) -> None:
        waiting(api, extender, a_pod().named("a").asking(11))
        waiting(api, extender, a_pod().named("b").in_namespace("team").asking(11))
        for query, expected in (
            ("state=waiting", ["a", "b"]),
            ("state=bound", []),
            ("namespace=team", ["b"]),
            ("filter=DEFAULT/a", ["a"]),
        ):
            assert expected == [row["name"] for row in extender.get(f"/v1/pods?{query}").json["items"]]

    def test_the_table_says_where_a_pod_is_and_why_another_waits(self, api: ApiServer, extender: Running) -> None:
        bound(api, extender, a_pod().named("train").asking(6), "n1")
        waiting(api, extender, a_pod().named("waits").asking(11))
        _, train, waits = extender.get("/v1/pods?as=wide").body.decode().splitlines()
        assert ["default", "train", "bound", "n1", "0", "6Gi", "-", "GPU-n1-0", "nothing"] == train.split()[:9]
        # what is asked is written as what is held
        assert ["default", "waits", "waiting", "-", "-", "11Gi"] == waits.split()[:6]

    def test_nothing_else_of_a_pod_is_shown(self, api: ApiServer, extender: Running) -> None:
        pod = a_pod().named("p").asking(6).annotated({"note": "a-secret"})
        bound(api, extender, pod, "n1")
        for path in ("/v1/pods", "/v1/nodes", "/v1/explain/default/p"):
            body = extender.get(path).body
            assert b"a-secret" not in body
            assert NAMES.grant.encode() not in body


class TestExplain:
    """/v1/explain says why a pod waits, and what would help."""

    def test_a_pod_that_fits_nowhere_is_explained(self, api: ApiServer, extender: Running) -> None:
        for name, node, asks in (("a", "n1", 6), ("b", "n1", 7), ("c", "n2", 8), ("d", "n2", 9)):
            bound(api, extender, a_pod().named(name).asking(asks), node)
        waiting(api, extender, a_pod().named("p").asking(5))

        told = extender.get("/v1/explain/default/p").json

        assert f"0/2 nodes fit: 2 {Reason.NO_GPU_FITS.sentence}" == told["summary"]
        assert Reason.NO_GPU_FITS == told["pod"]["reason"]
        # of n1 4 and 3 are free, of n2 2 and 1
        assert ["n1", "n2"] == [node["node"] for node in told["nodes"]]
        assert [[1 * GIB, 2 * GIB], [3 * GIB, 4 * GIB]] == [
            [gpu["shortfallBytes"] for gpu in node["gpus"]] for node in told["nodes"]
        ]
        said = [change["sentence"] for change in told["changes"]]
        assert ["4 GiB fit now on n1 GPU 0", "it fits on n1 GPU 0 if default/a (6 GiB) ended"] == said[:2]

    def test_the_table_reads_as_sentences(self, api: ApiServer, extender: Running) -> None:
        waiting(api, extender, a_pod().named("p").asking(11))
        assert extender.get("/v1/explain/default/p?as=table").body.decode().splitlines() == [
            "default/p asks 11 GiB: waiting, fits on none of 2 GPU nodes",
            f"  2 nodes: {Reason.TOO_LARGE.sentence} (best: n1 GPU 0 has 10 GiB in all)",
            "  would help:",
            "    10 GiB fit now on n1 GPU 0",
        ]

    def test_a_bound_pod_is_shown_with_what_it_holds(self, api: ApiServer, extender: Running) -> None:
        bound(api, extender, a_pod().named("p").asking(6), "n1")
        assert "it is bound to n1 and holds 6 GiB of GPU 0" == extender.get("/v1/explain/default/p").json["summary"]

    def test_a_pod_that_fits_waits_for_something_else(self, api: ApiServer, extender: Running) -> None:
        waiting(api, extender, a_pod().named("p").asking(5))
        told = extender.get("/v1/explain/default/p").json
        assert (2, []) == (told["fitting"], told["changes"])
        assert told["summary"].startswith("its GPU memory fits on 2 of 2 GPU nodes (n1, n2)")

    @pytest.mark.parametrize(
        ("pod", "why"),
        [
            (a_pod().asking("1.5"), "'1.5' is not a whole number"),
            (a_pod().asking(5).wishing(policy="worst-fit"), "'worst-fit' is none of"),
        ],
    )
    def test_a_request_that_cannot_be_read_is_told_so(
        self, api: ApiServer, extender: Running, pod: PodBuilder, why: str
    ) -> None:
        waiting(api, extender, pod.named("p"))
        told = extender.get("/v1/explain/default/p").json
        assert Reason.BAD_REQUEST == told["pod"]["reason"]
        assert why in told["summary"]

    def test_a_grant_that_cannot_be_read_is_told(self, api: ApiServer, extender: Running) -> None:
        pod = submit(api, a_pod().named("p").asking(1).bound_to("n1", "{"))
        assert eventually(lambda: extender.stage(pod))
        told = extender.get("/v1/explain/default/p").json
        assert Reason.BAD_GRANT == told["pod"]["reason"]
        assert told["summary"].startswith("it is bound to n1, but the pod's grant")
        # it counts on every GPU of the node
        shown = extender.get("/v1/nodes?filter=n1").json["items"][0]["gpus"]
        assert [[("default/p", 1 * GIB)]] * 2 == [[(h["pod"], h["bytes"]) for h in gpu["holders"]] for gpu in shown]

    def test_a_grant_of_a_gpu_that_is_gone_is_shown_by_its_uuid(self, api: ApiServer, extender: Running) -> None:
        grant = a_grant(granted({"GPU-lost": 2 * GIB}))
        assert grants.decode(grants.encode(grant)) == grant
        pod = submit(api, a_pod().named("p").asking(2).bound_to("n1", grant))
        assert eventually(lambda: extender.stage(pod))
        assert extender.get("/v1/explain/default/p").json["summary"].endswith("holds 2 GiB of GPU GPU-lost")


class TestErrors:
    """Errors are sentences."""

    @pytest.mark.parametrize(
        ("path", "status", "why"),
        [
            ("/v1/explain/default/nobody", 404, "no pod 'nobody' in namespace 'default' asks for shared GPU memory"),
            ("/v1/nodes?limit=0", 400, "limit='0' is not a whole number from 1 to 1000"),
            ("/v1/nodes?limit=1001", 400, "limit='1001' is not a whole number from 1 to 1000"),
            ("/v1/nodes?limit=\u0663", 400, "is not a whole number"),
            ("/v1/nodes?as=xml", 400, "as='xml' is none of json, yaml, table, wide, csv"),
            ("/v1/pods?state=lost", 400, "state='lost' is none of all, waiting, binding, bound, ungranted"),
            ("/v1/pods?namespace=%3Dteam-a", 400, "namespace='=team-a' can be no namespace's name"),
            ("/v1/gpus", 404, "GET /v1/gpus: there is no such path here"),
            ("/v1/explain/default/team-a/p", 404, "there is no such path here"),
            ("/v1/simulate", 405, "The method is not allowed"),
            (f"/v1/pods?filter={'x' * 101}", 400, "filter has 101 letters, more than the 100 allowed"),
            ("/v1/explain/default/p?as=csv", 404, "no pod 'p'"),
        ],
    )
    @pytest.mark.usefixtures("api")
    def test_a_question_that_cannot_be_answered(self, extender: Running, path: str, status: int, why: str) -> None:
        answer = extender.get(path.replace("\u0663", "%D9%A3"))
        assert status == answer.status
        # kubectl shows the message of a Status, and drops any other body
        assert ("Status", status) == (answer.json["kind"], answer.json["code"])
        assert why in answer.json["message"]

    def test_nothing_is_shown_before_the_cluster_has_been_read(
        self, api: ApiServer, start: Callable[..., Running]
    ) -> None:
        hold = api.faults.hold(method="GET", path=r"/api/v1/nodes\?")
        extender = start(wait=False)
        assert hold.reached.wait(PATIENCE)
        answer = extender.get("/v1/nodes")
        assert 503 == answer.status
        assert "the extender has not read the cluster yet; ask again in a moment" == answer.json["message"]
        hold.release()
        assert eventually(lambda: extender.get("/v1/nodes").status == 200)


class TestMix:
    """/v1/mix: what policies expect."""

    @pytest.mark.usefixtures("api")
    def test_it_has_a_row_for_each_kind_of_pod_in_every_form(self, start: Callable[..., Running]) -> None:
        kinds = "[{weight: 3, memory: 5GiB, cpu: 500m}, {weight: 1, gpus: 2, alone: true, models: [H100]}]"
        extender = start(mix=yaml.safe_load(kinds))

        page = extender.get("/v1/mix").json
        # 5 of the 10 GiB of the largest GPU
        small = {"percent": 75.0, "gpus": 1, "memoryBytes": 5 * GIB, "cpuMilli": 500, "models": [], "alone": False}
        assert (True, small) == (page["pinned"], page["items"][0])
        lines = extender.get("/v1/mix?as=table").body.decode().splitlines()
        assert ["25.0", "%", "2", "alone", "0", "H100"] == lines[2].split()
        assert "EXPECTED: 2 kinds of pods, pinned by the configuration" == lines[3]
        assert "75.0,1,5368709120,500,,False" == extender.get("/v1/mix?as=csv").body.decode().splitlines()[1]

    @pytest.mark.usefixtures("api")
    def test_where_no_pod_has_come_it_says_so(self, start: Callable[..., Running]) -> None:
        assert "No pod of ours has come yet" in start().get("/v1/mix?as=table").body.decode()


class TestSimulation:
    """/v1/simulate explains a pod that is not there."""

    def test_it_says_where_the_pod_goes_when_it_comes(self, api: ApiServer, start: Callable[..., Running]) -> None:
        extender = start(policy="binpack")
        bound(api, extender, a_pod().named("train").asking(6), "n2")
        pod = a_pod().named("new").asking(3)

        told = tried(extender, pod, "table")

        # binpack fills the GPU that has least left
        uuid, *_ = bound_uuids(extender)
        index = int(uuid.rpartition("-")[2])
        assert (
            "default/new asks 3 GiB: simulated\n"
            f"  it fits on 2 of 2 nodes that are well, and would go to n2 GPU {index}, by the policy binpack\n"
        ) == told.body.decode()
        bound(api, extender, pod, "n2")
        assert {uuid} == set(bound_uuids(extender))

    def test_a_pod_that_fits_nowhere_is_explained(self, extender: Running) -> None:
        told = tried(extender, a_pod().named("big").asking(11), "table").body.decode()
        assert told.startswith("default/big asks 11 GiB: simulated, fits on none of 2 GPU nodes\n")
        assert "10 GiB fit now on n1 GPU 0" in told

    def test_a_node_that_lacks_memory_alone_is_well_for_a_mig_instance(self, api: ApiServer, extender: Running) -> None:
        add(api, a_node("n3").with_gpu("10GiB").with_mig().advertising("0"))
        assert eventually(lambda: extender.ledger.view("n3"))

        told = tried(extender, a_pod().asking("1", of="nvidia.com/mig-1g.5gb")).json

        # n1 and n2 have no MIG GPU, with which nothing is wrong
        assert told["summary"].startswith("it fits on 1 of 3 nodes that are well, and would go to n3 GPU 1,")

    def test_nothing_is_kept_of_it(self, api: ApiServer, extender: Running) -> None:
        before = len(api.writes)
        assert 2 == tried(extender, a_pod().asking(3)).json["fitting"]
        assert ([], before) == (extender.get("/v1/pods").json["items"], len(api.writes))

    def test_a_request_that_no_node_could_meet_is_said_to_be_one(self, extender: Running) -> None:
        told = tried(extender, a_pod().asking(3).wishing(policy="best"))
        assert "no node can help: cotenant.io/policy: " in told.json["summary"]

    @pytest.mark.parametrize(
        ("body", "why"),
        [
            (b"{", "is no Pod as the API server has it"),
            # as the API server answers to its creation with --dry-run=server
            (
                b'{"kind":"Deployment","metadata":{"name":"d","namespace":"default","uid":"u"},"spec":{"replicas":1}}',
                "what was posted is a 'Deployment' and no Pod: `cotenant plan fit --file` takes Deployments",
            ),
            (a_pod().as_json(), "asks for nothing of ours"),
        ],
    )
    def test_what_is_no_pod_of_ours_is_refused_with_a_sentence(
        self, extender: Running, body: bytes | Json, why: str
    ) -> None:
        answer = call(extender.other_address, "POST", "/v1/simulate", body)
        assert 400 == answer.status
        assert why in answer.json["message"]


def tried(extender: Running, pod: PodBuilder, form: str = "json") -> Answer:
    return call(extender.other_address, "POST", f"/v1/simulate?as={form}", pod.as_json())


def bound_uuids(extender: Running) -> list[str]:
    """List the GPUs that pods hold."""
    return [uuid for hold in extender.ledger.holds() for uuid in hold.charges]
