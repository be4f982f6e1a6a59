"""Traces that are not what they should be are refused by file, line and column, with what was expected."""

from pathlib import Path

import pytest

from cotenant.simulator.trace import (
    Order,
    TraceError,
    TraceNode,
    TracePod,
    draw_order,
    read_nodes,
    read_order,
    read_pods,
)

NODES = "sn,cpu_milli,memory_mib,gpu,model\nb,64000,262144,2,P100\na,96000,786432,8,G2\nc,32000,262144,0,\n"
PODS = "name,cpu_milli,memory_mib,num_gpu,gpu_milli,gpu_spec,qos\np0,12000,16384,1,1000,,LS\n"
PODS += "p1,4000,100,1,250,G2|P100,BE\n"


def a_file(folder: Path, text: str | bytes, name: str = "trace.csv") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


class TestGood:
    """What openb's files hold is read."""

    def test_nodes_are_sorted_by_name(self, tmp_path: Path) -> None:
        found = read_nodes(a_file(tmp_path, NODES))

        assert ["a", "b", "c"] == [node.name for node in found]
        assert TraceNode("b", 64000, 262144, 2, "P100") == found[1]

    def test_pods_keep_their_order_and_their_models(self, tmp_path: Path) -> None:
        found = read_pods(a_file(tmp_path, PODS), read_nodes(a_file(tmp_path, NODES, "nodes.csv")))

        assert TracePod("p0", 12000, 16384, 1, 1000) == found[0]
        assert ("G2", "P100") == found[1].models
        assert ["1", "share"] == [pod.kind for pod in found]

    def test_gpu_spec_may_be_missing_as_in_openbs_multigpu_traces(self, tmp_path: Path) -> None:
        text = "name,cpu_milli,memory_mib,num_gpu,gpu_milli\np0,1000,100,2,1000\n"
        (pod,) = read_pods(a_file(tmp_path, text), read_nodes(a_file(tmp_path, NODES, "nodes.csv")))

        assert () == pod.models
        assert "2" == pod.kind

    def test_a_spreadsheets_byte_order_mark_and_decimals_are_read(self, tmp_path: Path) -> None:
        (node,) = read_nodes(
            a_file(tmp_path, b"\xef\xbb\xbfsn,cpu_milli,memory_mib,gpu,model\r\nn,64000.0,1024,1,T4\r\n")
        )

        assert 64000 == node.cpu_milli


class TestOthers:
    """What openb's other traces have, and what people's tools make of them."""

    def read(self, folder: Path, text: str) -> list[TracePod]:
        return read_pods(a_file(folder, text), read_nodes(a_file(folder, NODES, "nodes.csv")))

    def test_a_model_may_be_named_twice_as_in_openbs_gpuspec_traces(self, tmp_path: Path) -> None:
        (pod,) = self.read(tmp_path, row(gpu_spec="G2|P100|P100"))

        assert ("G2", "P100", "P100") == pod.models

    def test_columns_may_stand_in_any_order_beside_others(self, tmp_path: Path) -> None:
        # an index without a name, as pandas writes it; and what openb has besides
        text = ",gpu_milli,num_gpu,memory_mib,cpu_milli,name,qos,pod_phase,deletion_time,scheduled_time,note\r\n"
        text += '0,500.0,1.0,100.0,4000.0,p,Burstable,Running,12537496,,"one, two"\r\n1,0,0,100,4000,q,BE,Failed,,,\r\n'

        assert [TracePod("p", 4000, 100, 1, 500), TracePod("q", 4000, 100, 0, 0)] == self.read(tmp_path, text)

    def test_a_pod_without_gpus_insists_on_no_model(self, tmp_path: Path) -> None:
        (pod,) = self.read(tmp_path, row(num_gpu="0", gpu_milli="0", gpu_spec="G2"))

        assert () == pod.models

    def test_a_line_without_anything_at_the_end_is_no_pod(self, tmp_path: Path) -> None:
        assert 1 == len(self.read(tmp_path, row() + "\n"))

    def test_pods_of_parts_of_several_gpus_are_read(self, tmp_path: Path) -> None:
        (pod,) = self.read(tmp_path, row(num_gpu="2", gpu_milli="250"))

        assert 500 == pod.milli


def row(**values: str) -> str:
    cells = {"name": "p", "cpu_milli": "1000", "memory_mib": "100", "num_gpu": "1", "gpu_milli": "500", "gpu_spec": ""}
    return ",".join(cells) + "\n" + ",".join((cells | values).values()) + "\n"


class TestBadPods:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("", "line 1, column name: expected the columns name, cpu_milli"),
            ("name,cpu_milli\np,1\n", "line 1, column memory_mib: expected the columns"),
            ("name,cpu_milli,memory_mib,num_gpu,gpu_milli\n", "line 2, column name: expected at least one row"),
            (
                row(cpu_milli="-1000"),
                "line 2, column cpu_milli: expected a whole number from 0 to 4096000, not '-1000'",
            ),
            (row(cpu_milli="4 cores"), "line 2, column cpu_milli: expected a whole number"),
            (row(cpu_milli="٣"), "line 2, column cpu_milli: expected a whole number"),
            (row(memory_mib=""), "line 2, column memory_mib: expected a whole number"),
            (row(memory_mib="1" * 5000), "line 2, column memory_mib: expected a whole number"),
            (row(gpu_milli="10000"), "line 2, column gpu_milli: expected a whole number from 0 to 1000, not '10000'"),
            (row(cpu_milli="960000"), "line 2, column cpu_milli: expected at most 96000, what the largest node has"),
            (row(num_gpu="9", gpu_milli="1000"), "line 2, column num_gpu: expected at most 8"),
            (row(num_gpu="0"), "line 2, column gpu_milli: expected 0 for 0 GPUs"),
            (row(gpu_milli="0"), "line 2, column gpu_milli: expected 0 for 0 GPUs and 1 to 1000 for others"),
            (row(gpu_spec="H200"), "line 2, column gpu_spec: expected models that a node has (G2, P100), not 'H200'"),
            (row(name=""), "line 2, column name: expected a name that no other pod has"),
            (row() + "p,1000,100,1,500,\n", "line 3, column name: expected a name that no other pod has, not 'p'"),
            (row() + "q,1000,100\n", "line 3, column 4: expected 6 values, as the header has"),
            (row() + "q,1000,100,1,500,,,,\n", "line 3, column"),
            (b"name,cpu_milli\xff\n", "expected CSV in UTF-8"),
        ],
    )
    def test_a_bad_trace_is_refused(self, tmp_path: Path, text: str | bytes, expected: str) -> None:
        nodes = read_nodes(a_file(tmp_path, NODES, "nodes.csv"))
        with pytest.raises(TraceError) as refusal:
            read_pods(a_file(tmp_path, text), nodes)

        assert str(refusal.value).startswith(str(tmp_path / "trace.csv"))
        assert expected in str(refusal.value)


class TestBadNodes:
    @pytest.mark.parametrize(
        ("row", "expected"),
        [
            ("n,64000,1024,65,G2", "column gpu: expected a whole number from 0 to 64, not '65'"),
            ("n,64000,1024,2,", "column model: expected a model for 2 GPUs"),
            ("n,64000,1024,0,G2", "column model: expected no model for 0 GPUs"),
            (",64000,1024,0,", "column sn: expected a name"),
        ],
    )
    def test_a_bad_node_is_refused(self, tmp_path: Path, row: str, expected: str) -> None:
        with pytest.raises(TraceError, match="line 2") as refusal:
            read_nodes(a_file(tmp_path, f"sn,cpu_milli,memory_mib,gpu,model\n{row}\n"))

        assert expected in str(refusal.value)


class TestOrder:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("", "line 1, column 1: expected two lines"),
            ("0 1\n", "line 2, column 1: expected two lines"),
            ("0 0\n0\n", "line 1, column 2: expected each of 0 to 1 once"),
            ("0 1\n0 2\n", "line 2, column 2: expected the index of a pod, 0 to 1, not 2"),
            ("0 1\n0 x\n", "line 2, column 2: expected whole numbers"),
            ("0 1\n\n", "line 2, column 1: expected the index of a pod"),
            (b"\xff\n\n", "line 1, column 1: expected whole numbers"),
        ],
    )
    def test_a_bad_sequence_is_refused(self, tmp_path: Path, text: str | bytes, expected: str) -> None:
        with pytest.raises(TraceError) as refusal:
            read_order(a_file(tmp_path, text), nodes=2, pods=2)

        assert expected in str(refusal.value)

    def test_a_sequence_is_read(self, tmp_path: Path) -> None:
        assert Order(arrivals=(1, 1, 0), ranks=(1, 0)) == read_order(a_file(tmp_path, "1 0\n1 1 0\n"), nodes=2, pods=2)

    def test_a_drawn_order_holds_every_pod_and_asks_as_much_as_wanted(self) -> None:
        nodes = [TraceNode("n", 1, 1, 8, "G2")]
        pods = [TracePod(f"p{n}", 1, 1, 1, 100) for n in range(20)]
        drawn = draw_order(pods, nodes, seed=1, ratio=1.3)

        assert set(range(20)) == set(drawn.arrivals)
        # 1.3 x 8 GPUs are 104 pods of a tenth of one
        assert 104 == len(drawn.arrivals)
        assert drawn == draw_order(pods, nodes, seed=1, ratio=1.3)
        assert drawn != draw_order(pods, nodes, seed=2, ratio=1.3)

    def test_pods_that_ask_too_much_together_are_left_out(self) -> None:
        pods = [TracePod(f"p{n}", 1, 1, 1, 1000) for n in range(20)]
        drawn = draw_order(pods, [TraceNode("n", 1, 1, 8, "G2")], seed=1, ratio=0.5)

        assert 4 == len(set(drawn.arrivals)) == len(drawn.arrivals)

    def test_pods_without_gpus_alone_are_drawn_once_each(self) -> None:
        pods = [TracePod(f"p{n}", 1, 1, 0, 0) for n in range(3)]

        assert [0, 1, 2] == sorted(draw_order(pods, [TraceNode("n", 1, 1, 8, "G2")], seed=1, ratio=1).arrivals)
