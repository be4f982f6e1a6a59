"""Pods that come and go as the trace's did: as many as the load says, the same for every policy."""

from pathlib import Path

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner

from cotenant.cli.main import main
from cotenant.simulator.churn import draw, fewer, half_width
from cotenant.simulator.timeline import Job
from cotenant.simulator.trace import TraceError, TraceNode, TracePod, read_lives, read_nodes, read_pods

NODES = [TraceNode(f"n{n:02}", 64_000, 262_144, 4, "G2" if n % 4 else "T4") for n in range(8)]
PODS = [TracePod("short", 1000, 10, 1, 500), TracePod("long", 1000, 10, 1, 1000), TracePod("cpu", 1000, 10, 0, 0)]
LIVES = [600.0, 36_000.0, 60.0]


def held(jobs: list[Job], at: float) -> int:
    """Add up the milli of the jobs that are there at a moment, if none waits."""
    return sum(
        job.request.containers[0].units
        for job in jobs
        if job.request.containers and job.arrival <= at < job.arrival + job.life
    )


@pytest.mark.parametrize("together", [False, True])
def test_what_would_be_held_is_the_load(*, together: bool) -> None:
    found = []
    for seed in range(60):
        jobs = draw(NODES, PODS, LIVES, load=0.8, hours=10, seed=seed, together=together)
        found += [held(jobs, hours * 3600) for hours in (0, 5, 9.9)]

    # 80 percent of 32 GPUs, also when it begins
    assert 25_600 == pytest.approx(np.mean(found), rel=0.04)


def test_the_same_seed_draws_the_same() -> None:
    first, second, other = (draw(NODES, PODS, LIVES, load=0.8, hours=10, seed=seed) for seed in (1, 1, 2))

    assert first == second
    assert first != other


def test_pods_drawn_together_with_their_lives_keep_them() -> None:
    jobs = draw(NODES, PODS, LIVES, load=1, hours=10, seed=1, together=True)

    assert {(500, 600.0), (1000, 36_000.0), (0, 60.0)} == {
        (job.request.containers[0].units if job.request.containers else 0, job.life)
        for job in jobs
        if job.uid.startswith("arrival")
    }


def test_a_smaller_cluster_is_of_the_same_mixture() -> None:
    assert ["G2", "G2", "G2", "T4"] == sorted(node.model for node in fewer(NODES, 2))
    assert NODES == fewer(NODES, 1)


def test_intervals_are_students() -> None:
    # of 1 to 5: deviation 1.5811, over the root of 5, times 2.776 for 4 degrees of freedom
    assert 1.963 == half_width([1, 2, 3, 4, 5])
    assert 0 == half_width([3])
    # 25 times 0 and 25 times 1: deviation 0.50508, over the root of 50, times 2.0096 for 49 degrees of freedom
    assert 0.144 == half_width([0, 1] * 25)
    # 17 times a thousand: deviation 514.5, over the root of 17, times 2.120 for 16 degrees of freedom
    assert 264.5 == pytest.approx(half_width([0, 1000] * 8 + [0]), abs=0.1)


def written(folder: Path, *, times: str = "creation_time,deletion_time,scheduled_time") -> list[str]:
    (folder / "nodes.csv").write_text(
        "sn,cpu_milli,memory_mib,gpu,model\n" + "\n".join(f"n{n},64000,262144,4,G2" for n in range(4))
    )
    rows = [f"p{n},1000,10,1,{share},,0,{600 * (n + 1)},{n}" for n, share in enumerate((300, 460, 1000, 250, 1000))]
    (folder / "pods.csv").write_text(
        "\n".join([f"name,cpu_milli,memory_mib,num_gpu,gpu_milli,gpu_spec,{times}", *rows])
    )
    return ["--nodes", str(folder / "nodes.csv"), "--pods", str(folder / "pods.csv")]


class TestLives:
    def test_they_begin_when_a_pod_was_scheduled(self, tmp_path: Path) -> None:
        written(tmp_path)
        pods = read_pods(tmp_path / "pods.csv", read_nodes(tmp_path / "nodes.csv"))

        assert [600, 1199, 1798, 2397, 2996] == read_lives(tmp_path / "pods.csv", pods)

    @pytest.mark.parametrize(
        ("times", "expected"),
        [
            ("creation_time,gone,scheduled_time", "line 1, column deletion_time: expected the columns name, creation"),
            ("deletion_time,creation_time,x", "line 2, column deletion_time: expected a time after creation_time"),
        ],
    )
    def test_those_that_are_none_are_refused(self, tmp_path: Path, times: str, expected: str) -> None:
        written(tmp_path, times=times)
        pods = read_pods(tmp_path / "pods.csv", read_nodes(tmp_path / "nodes.csv"))
        with pytest.raises(TraceError) as refusal:
            read_lives(tmp_path / "pods.csv", pods)

        assert expected in str(refusal.value)


def test_what_goes_wrong_in_another_process_is_told_here(tmp_path: Path) -> None:
    files = written(tmp_path)
    # nobody lives: there is nothing to draw
    text = (tmp_path / "pods.csv").read_text()
    (tmp_path / "pods.csv").write_text("\n".join([text.splitlines()[0], "p,1000,10,1,300,,5,5,5"]))
    done = CliRunner().invoke(
        main, ["churn", *files, "--out", str(tmp_path / "out"), "--policy", "fgd", "--seeds", "1"]
    )

    assert 1 == done.exit_code
    assert "pods.csv, line 1, column deletion_time: expected pods that live" in done.output


@pytest.mark.parametrize(
    ("row", "drift", "expected"),
    [
        ("p,1000,10,0,0,,5,15,5", None, "pods.csv, line 1, column deletion_time: expected pods that live, ask GPUs"),
        (None, "p,1000,10,0,0,,5,15,5", "drift.csv, line 1, column num_gpu: expected pods that ask GPUs"),
        # of the nodes kept none has 5 GPUs
        (None, "p,1000,10,5,1000,,5,15,5", "drift.csv, line 1, column num_gpu: expected pods that ask GPUs"),
    ],
)
def test_pods_of_which_no_load_can_be_made_are_refused(
    tmp_path: Path, row: str | None, drift: str | None, expected: str
) -> None:
    files = written(tmp_path)
    nodes = (tmp_path / "nodes.csv").read_text()
    (tmp_path / "nodes.csv").write_text(f"{nodes}\nz,64000,262144,8,G2\n")
    header = (tmp_path / "pods.csv").read_text().splitlines()[0]
    if row is not None:
        (tmp_path / "pods.csv").write_text(f"{header}\n{row}\n")
    if drift is not None:
        (tmp_path / "drift.csv").write_text(f"{header}\n{drift}\n")
        files += ["--drift", str(tmp_path / "drift.csv")]
    out = ["--out", str(tmp_path / "out"), "--policy", "fgd", "--seeds", "1", "--hours", "1", "--every", "5"]
    done = CliRunner().invoke(main, ["churn", *files, *out])

    assert 1 == done.exit_code
    assert expected in done.output


def test_a_row_for_each_policy_and_load_and_the_same_again_without_playing(tmp_path: Path) -> None:
    arguments = ["churn", *written(tmp_path), "--out", str(tmp_path / "out"), "--plot", str(tmp_path / "out.svg")]
    arguments += [
        "--loads",
        "80,120",
        "--seeds",
        "1-3",
        "--hours",
        "4",
        "--policy",
        "priced-leftovers",
        "--policy",
        "spread",
    ]
    done = CliRunner().invoke(main, arguments)

    assert 0 == done.exit_code, done.output
    assert "120 % spread" in done.output
    rows = [line.split(",") for line in (tmp_path / "out" / "churn.csv").read_text().splitlines()]
    assert [["priced-leftovers", "0.8"], ["priced-leftovers", "1.2"], ["spread", "0.8"], ["spread", "1.2"]] == [
        row[:2] for row in rows[1:]
    ]
    assert "<svg" in (tmp_path / "out.svg").read_text()
    reports = sorted((tmp_path / "out").glob("*.json"))
    assert 2 * 2 * 3 == len(reports)
    found = [msgspec.json.decode(path.read_bytes()) for path in reports]
    # who asks more than there is, waits
    assert 0 < max(report["waiting"] for report in found)
    kept = {path: path.stat().st_mtime_ns for path in reports}
    assert 0 == CliRunner().invoke(main, arguments).exit_code
    assert kept == {path: path.stat().st_mtime_ns for path in reports}
