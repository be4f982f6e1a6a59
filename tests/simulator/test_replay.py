"""Replays overbook nothing, drop nothing that fits, and come out the same from the same."""

import subprocess
import sys
from pathlib import Path
from random import Random

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner

from cotenant.cli.main import main
from cotenant.contract.units import MIB
from cotenant.simulator.cluster import new_ledger
from cotenant.simulator.replay import Run, replay
from cotenant.simulator.report import report
from cotenant.simulator.sampling import Sampler
from cotenant.simulator.trace import Order, TraceNode, TracePod, draw_order
from extender.policies import POLICIES
from extender.policies.table import Table


def a_cluster() -> list[TraceNode]:
    random = Random(0)
    kinds = [(96_000, 8, "G2"), (64_000, 2, "P100"), (64_000, 4, "T4"), (32_000, 0, "")]
    return [
        TraceNode(f"n{n:03}", cpu, 262_144, gpus, model)
        for n in range(12)
        for cpu, gpus, model in [random.choice(kinds)]
    ]


def some_pods(count: int = 150) -> list[TracePod]:
    random = Random(0)
    sizes = [(0, 0), (1, 250), (1, 460), (1, 810), (1, 1000), (1, 1000), (2, 1000), (4, 1000), (8, 1000)]
    pods = []
    for n in range(count):
        gpus, share = random.choice(sizes)
        models = ("T4", "P100") if gpus == 1 and random.random() < 0.1 else ()
        pods.append(
            TracePod(f"p{n}", random.choice([1000, 4000, 8000]), random.choice([1024, 16384]), gpus, share, models)
        )
    return pods


def a_run(policy: str = "priced-leftovers", *, sample: bool = False) -> tuple[list[TraceNode], Run]:
    cluster, pods = a_cluster(), some_pods()
    return cluster, replay(cluster, pods, draw_order(pods, cluster, seed=3, ratio=1.3), policy, sample=sample)


@pytest.mark.parametrize("policy", POLICIES)
class TestEveryPolicy:
    def test_nothing_is_overbooked_and_nothing_that_fits_is_dropped(self, policy: str) -> None:
        nodes, run = a_run(policy)
        cpu, memory = [node.cpu_milli for node in nodes], [node.memory_mib for node in nodes]
        # GPU memory is the ledger's to keep; in all, a node holds no more than it has
        milli = [1000 * node.gpus for node in nodes]
        for pod, row in zip(run.pods, run.row, strict=True):
            if row < 0:
                continue
            assert not pod.models or nodes[row].model in pod.models
            cpu[row] -= pod.cpu_milli
            memory[row] -= pod.memory_mib
            milli[row] -= pod.milli
        assert min(cpu + memory + milli) >= 0
        assert sum(milli) == run.free[-1]
        for pod, row in zip(run.pods, run.row, strict=True):
            if row < 0 and not pod.gpus:
                # it was dropped, and nothing ever leaves: it fits nowhere now either
                assert not any(c >= pod.cpu_milli and m >= pod.memory_mib for c, m in zip(cpu, memory, strict=True))

    def test_the_same_order_gives_the_same_run(self, policy: str) -> None:
        assert a_run(policy)[1].row.tolist() == a_run(policy)[1].row.tolist()


class TestSample:
    def test_a_small_cluster_is_shown_whole(self) -> None:
        assert a_run(sample=True)[1].row.tolist() == a_run()[1].row.tolist()

    def test_a_large_one_is_shown_in_turns(self) -> None:
        table = Table(new_ledger([TraceNode(f"n{n:04}", 64_000, 1024, 1, "G2") for n in range(1000)]))
        rows = np.array([table.rows[f"n{n:04}"] for n in range(1000)])
        sampler = Sampler(table, rows)
        every = table.known.copy()
        half = 500 * MIB

        # kube-scheduler: 50 - 1000/125 = 42 percent
        first, second, third = (sampler.shown(every, every, half) for _ in range(3))
        assert [420] * 3 == [int(shown.sum()) for shown in (first, second, third)]
        assert not (first & second).any()
        # 3 x 420 are 260 more than there are
        assert 260 == (first & third).sum()

    def test_what_fits_in_no_sample_but_elsewhere_is_nominated(self) -> None:
        table = Table(new_ledger([TraceNode(f"n{n:04}", 64_000, 1024, 1, "G2") for n in range(1000)]))
        rows = np.array([table.rows[f"n{n:04}"] for n in range(1000)])
        last = np.zeros_like(table.known)
        last[rows[-1]] = True

        assert Sampler(table, rows).shown(table.known, last, 500 * MIB)[rows[-1]]


@pytest.mark.parametrize("policy", ["priced-leftovers", "fgd", "binpack"])
def test_a_model_is_not_taken_for_another_whose_name_holds_its_own(policy: str) -> None:
    nodes = [
        TraceNode("a", 64_000, 1024, 1, "A10"),
        TraceNode("b", 64_000, 1024, 1, "A100"),
        TraceNode("c", 1, 1, 0, ""),
    ]
    pods = [TracePod("p", 1000, 10, 1, 1000, ("A10",)), TracePod("q", 1000, 10, 1, 1000, ("A100",))]
    order = Order(arrivals=(0, 0, 1, 1), ranks=(0, 1, 2))

    assert [0, -1, 1, -1] == replay(nodes, pods, order, policy).row.tolist()


class TestReport:
    def test_columns_average_what_was_seen_at_that_load(self) -> None:
        nodes = [TraceNode("n", 64_000, 1024, 1, "G2")]
        pods = [TracePod("half", 1000, 10, 1, 500), TracePod("most", 1000, 10, 1, 600)]
        found = report(replay(nodes, pods, Order(arrivals=(0, 1, 0), ranks=(0,)), "binpack"), policy="binpack", seed=0)

        # 50, then 110 percent arrived, of which the second was dropped, then 160: beyond the last column
        assert {"50": 50.0, "110": 50.0} == found.allocation
        assert {"share": 0.0} == found.dropped
        assert 2 == found.placed

    def test_drops_are_percent_of_what_their_kind_asked(self) -> None:
        nodes = [TraceNode("n", 3000, 1024, 4, "G2")]
        pods = [TracePod("cpu", 1000, 10, 0, 0), TracePod("one", 1000, 10, 1, 1000)]
        done = replay(nodes, pods, Order(arrivals=(0, 1, 1, 1, 1, 0), ranks=(0,)), "fgd")

        # 3 cores: one pod without GPUs and two with one; the last, without, comes at 100 percent too
        assert {"1": 50.0, "cpu": 50.0} == report(done, policy="fgd", seed=0).dropped


def written(folder: Path) -> tuple[str, str]:
    """Write a small trace, and give the files' names."""

    def csv(name: str, header: str, rows: list[str]) -> str:
        (folder / name).write_text("\n".join([header, *rows]) + "\n")
        return str(folder / name)

    nodes = [f"{n.name},{n.cpu_milli},{n.memory_mib},{n.gpus},{n.model}" for n in a_cluster()]
    pods = [
        f"{p.name},{p.cpu_milli},{p.memory_mib},{p.gpus},{p.share_milli},{'|'.join(p.models)}" for p in some_pods(40)
    ]
    return (
        csv("nodes.csv", "sn,cpu_milli,memory_mib,gpu,model", nodes),
        csv("pods.csv", "name,cpu_milli,memory_mib,num_gpu,gpu_milli,gpu_spec", pods),
    )


class TestCommand:
    def simulate(self, folder: Path, *more: str) -> tuple[int, str]:
        nodes, pods = written(folder)
        done = CliRunner().invoke(main, ["simulate", "--nodes", nodes, "--pods", pods, "--seed", "7", *more])
        return done.exit_code, done.output

    def test_figures_are_printed_and_written(self, tmp_path: Path) -> None:
        status, output = self.simulate(
            tmp_path, "--json", str(tmp_path / "out.json"), "--plot", str(tmp_path / "out.svg")
        )

        assert 0 == status
        assert "allocated, %" in output
        written = msgspec.json.decode((tmp_path / "out.json").read_bytes())
        assert {"allocation", "fragmentation", "dropped", "seconds", "seed", "policy"} <= set(written)
        assert (7, "priced-leftovers") == (written["seed"], written["policy"])
        assert "<svg" in (tmp_path / "out.svg").read_text()

    @pytest.mark.parametrize("ratio", ["0", "0.5", "0.94", "1", "2"])
    def test_a_plot_is_drawn_of_any_load(self, tmp_path: Path, ratio: str) -> None:
        status, output = self.simulate(tmp_path, "--ratio", ratio, "--plot", str(tmp_path / "out.svg"))

        assert 0 == status, output
        assert "<svg" in (tmp_path / "out.svg").read_text()

    def test_without_a_sequence_the_seed_draws_one_and_a_sample_may_be_shown(self, tmp_path: Path) -> None:
        nodes, pods = written(tmp_path)
        found = []
        for n, more in enumerate(([], [], ["--sample"], ["--seed", "48"])):
            target = str(tmp_path / f"{n}.json")
            arguments = ["--nodes", nodes, "--pods", pods, "--seed", "47", "--ratio", "1.3", "--json", target, *more]
            assert 0 == CliRunner().invoke(main, ["simulate", *arguments]).exit_code
            report = msgspec.json.decode((tmp_path / f"{n}.json").read_bytes())
            assert {"allocation", "fragmentation", "dropped", "seconds", "seed", "policy"} <= report.keys()
            assert ("priced-leftovers", 48 if more and "48" in more else 47) == (report["policy"], report["seed"])
            found.append(report["allocation"])

        # a few nodes are shown whole
        assert found[0] == found[1] == found[2]

    def test_a_bad_trace_ends_with_a_sentence(self, tmp_path: Path) -> None:
        (tmp_path / "order.txt").write_text("0\n0\n")
        status, output = self.simulate(tmp_path, "--sequence", str(tmp_path / "order.txt"))

        assert 1 == status
        assert "order.txt, line 1, column 1: expected each of 0 to 11 once" in output

    def test_an_unknown_policy_is_named(self, tmp_path: Path) -> None:
        status, output = self.simulate(tmp_path, "--policy", "worst")

        assert 2 == status
        assert "'worst' is none of balanced, best-fit" in output

    @pytest.mark.parametrize(
        ("flag", "file", "expected"),
        [
            ("--plot", "out.xyz", "expected a name that ends in .svg, .png, .pdf, not"),
            ("--strips", "out", "expected a name that ends in .svg, .png, .pdf, not"),
            ("--plot", "missing/out.svg", "missing/out.svg: there is no folder"),
            ("--json", "missing/out.json", "missing/out.json: there is no folder"),
        ],
    )
    def test_what_cannot_be_written_is_told_before_the_run(
        self, tmp_path: Path, flag: str, file: str, expected: str
    ) -> None:
        status, output = self.simulate(tmp_path, "--json", str(tmp_path / "a.json"), flag, str(tmp_path / file))

        assert status in {1, 2}
        assert expected in output
        assert not (tmp_path / "a.json").exists()
        # the progress of a run
        assert "priced-leftovers" not in output

    def test_where_matplotlib_is_missing_no_run_begins_that_would_end_without_its_picture(self, tmp_path: Path) -> None:
        nodes, pods = written(tmp_path)
        picture = str(tmp_path / "a.svg")
        without = "import sys; sys.modules['matplotlib'] = None; from cotenant.cli.main import main; main()"
        for command in (["simulate", "--plot"], ["churn", "--out", str(tmp_path / "out"), "--plot"]):
            done = subprocess.run(
                [sys.executable, "-c", without, *command, picture, "--nodes", nodes, "--pods", pods],
                capture_output=True,
                text=True,
                check=False,
            )
            said = "Error: pictures need matplotlib: pip install '.[plots]' in Cotenant's checkout\n"
            assert (1, "", said) == (done.returncode, done.stdout, done.stderr)


class TestSweep:
    def sweep(self, folder: Path, *more: str) -> tuple[int, str]:
        nodes, pods = written(folder)
        out = str(folder / "out")
        done = CliRunner().invoke(main, ["sweep", "--nodes", nodes, "--pods", pods, "--out", out, *more])
        return done.exit_code, done.output

    def test_a_plot_may_lie_beside_the_reports_and_in_no_folder_that_is_missing(self, tmp_path: Path) -> None:
        policy = ("--policy", "fgd", "--seeds", "1")
        status, output = self.sweep(tmp_path, *policy, "--plot", str(tmp_path / "missing" / "a.svg"))
        assert (1, []) == (status, list((tmp_path / "out").iterdir()))
        assert "missing/a.svg: there is no folder" in output
        status, output = self.sweep(tmp_path, *policy, "--plot", str(tmp_path / "out" / "a.svg"))
        assert (0, True) == (status, (tmp_path / "out" / "a.svg").exists()), output

    def test_a_row_for_each_policy_and_the_same_again_without_replaying(self, tmp_path: Path) -> None:
        arguments = ("--policy", "fgd", "--policy", "binpack", "--seeds", "1,3-4")
        status, _ = self.sweep(tmp_path, *arguments)
        assert 0 == status
        reports = sorted((tmp_path / "out").glob("*.json"))
        # 2 policies x 3 seeds
        assert 6 == len(reports)
        summary = (tmp_path / "out" / "summary.csv").read_text()
        assert ["trace,policy,seeds", "pods,fgd,3", "pods,binpack,3"] == [
            ",".join(line.split(",")[:3]) for line in summary.splitlines()
        ]

        # one was cut off half-way: it alone is replayed
        kept = {path: path.stat().st_mtime_ns for path in reports[1:]}
        reports[0].write_bytes(reports[0].read_bytes()[:50])
        again, _ = self.sweep(tmp_path, *arguments)
        assert 0 == again
        assert kept == {path: path.stat().st_mtime_ns for path in reports[1:]}
        assert sorted((tmp_path / "out").glob("*.json")) == reports
        assert msgspec.json.decode(reports[0].read_bytes())

    def test_everything_is_drawn(self, tmp_path: Path) -> None:
        pictures = {name: tmp_path / f"{name}.svg" for name in ("plot", "latency", "strips")}
        options = [part for name, path in pictures.items() for part in (f"--{name}", str(path))]
        status, output = self.sweep(
            tmp_path, "--policy", "fgd", "--policy", "binpack/spread", "--seeds", "1-2", *options
        )

        assert 0 == status, output
        assert ["<svg"] * 3 == ["<svg"[: 4 * ("<svg" in path.read_text())] for path in pictures.values()]

    def test_dask_replays_what_this_machine_does(self, tmp_path: Path) -> None:
        dask, distributed = pytest.importorskip("dask"), pytest.importorskip("distributed")
        arguments = ("--policy", "fgd", "--seeds", "1-2")
        # it would look for GPUs through NVML, which other tests have made up
        with (
            dask.config.set({"distributed.diagnostics.nvml": False}),
            distributed.LocalCluster(
                n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None, protocol="tcp"
            ) as cluster,
        ):
            status, output = self.sweep(tmp_path, *arguments, "--scheduler", cluster.scheduler_address)
        assert 0 == status, output
        there = {
            path.name: msgspec.json.decode(path.read_bytes())["allocation"]
            for path in (tmp_path / "out").glob("*.json")
        }
        assert 2 == len(there)
        for path in (tmp_path / "out").glob("*.json"):
            path.unlink()
        assert 0 == self.sweep(tmp_path, *arguments)[0]

        # under the same names, so that a sweep begun here goes on there
        assert there == {
            path.name: msgspec.json.decode(path.read_bytes())["allocation"]
            for path in (tmp_path / "out").glob("*.json")
        }

    def test_a_dask_scheduler_that_is_not_there_is_told(self, tmp_path: Path) -> None:
        pytest.importorskip("distributed")
        status, output = self.sweep(tmp_path, "--policy", "fgd", "--seeds", "1", "--scheduler", "tcp://127.0.0.1:9")

        assert 1 == status
        assert "127.0.0.1:9" in output

    def test_a_sweep_and_a_single_run_agree(self, tmp_path: Path) -> None:
        self.sweep(tmp_path, "--policy", "fgd", "--seeds", "7")
        (swept,) = (tmp_path / "out").glob("pods-fgd-7-*.json")
        nodes, pods = written(tmp_path)
        one = str(tmp_path / "one.json")
        files = ["--nodes", nodes, "--pods", pods, "--json", one]
        CliRunner().invoke(main, ["simulate", *files, "--seed", "7", "--policy", "fgd"])

        single, other = (msgspec.json.decode(path.read_bytes()) for path in (tmp_path / "one.json", swept))
        assert single["allocation"] == other["allocation"]

    @pytest.mark.parametrize("seeds", ["", "x", "5-", "9-1", "1-99999999999"])
    def test_seeds_that_mean_nothing_are_refused(self, tmp_path: Path, seeds: str) -> None:
        status, output = self.sweep(tmp_path, "--seeds", seeds)

        assert 2 == status
        assert "such as 1,5,42-46" in output

    def test_a_missing_sequence_is_told_before_the_first_replay(self, tmp_path: Path) -> None:
        status, output = self.sweep(tmp_path, "--sequences", str(tmp_path), "--seeds", "1")

        assert 1 == status
        assert "pods_1.txt" in output
        assert not (tmp_path / "out").exists()
