"""`cotenant demo` from outside: what it shows, its exit status, and that nothing is left of it."""

import json
import os
import re
import signal
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple
from urllib.request import urlopen

import pytest
from click.testing import CliRunner

from cotenant import __version__
from cotenant.cli.demo.children import Children, DemoError
from cotenant.cli.main import main
from tests.exhaustion import no_file_beyond

COTENANT = Path(sysconfig.get_path("scripts")) / "cotenant"
# far beyond what a busy machine needs; only a demo that hangs comes near it
PATIENCE_SECONDS = 240


class Folder(NamedTuple):
    """Where a demo puts its files; short, as it holds sockets."""

    path: str

    @property
    def left(self) -> list[str]:
        return [path.name for path in Path(self.path).iterdir()]


@pytest.fixture(scope="module")
def folder() -> Iterator[Folder]:
    with tempfile.TemporaryDirectory(prefix="demo-") as path:
        yield Folder(path)


def start(folder: Folder, *options: str) -> subprocess.Popen[str]:
    environment = os.environ | {"TMPDIR": folder.path, "COLUMNS": "80"}
    # in a session of its own, so that a test can do to all of it what a terminal does at Ctrl-C
    return subprocess.Popen(
        [COTENANT, "demo", *options], stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )


def children(process: subprocess.Popen[str]) -> list[int]:
    found: list[int] = []
    for path in Path(f"/proc/{process.pid}/task").glob("*/children"):
        with suppress(FileNotFoundError):  # a thread that has just ended
            found += map(int, path.read_text().split())
    return found


def alive(pids: list[int]) -> list[int]:
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


class Run(NamedTuple):
    """Hold what a demo said that served until it was ended by SIGTERM, what it served, and what was left of it."""

    text: str
    status: int
    pods: set[str]
    kubeconfig_was_there: bool
    answer: str
    left_running: list[int]
    left_in_folder: list[str]

    def row(self, container: str) -> str:
        return next(line for line in self.text.splitlines() if re.match(rf". {container} ", line))


@pytest.fixture(scope="module")
def run(folder: Folder) -> Run:
    process = start(folder, "--plain", "--serve")
    assert process.stdout is not None
    lines: list[str] = []
    while not (lines and lines[-1].startswith("  logs ")):
        lines.append(process.stdout.readline())
        assert lines[-1], f"it ended before it served:\n{''.join(lines)}"
    served = {line[2:12].strip(): line[13:].strip() for line in lines[-6:]}
    with urlopen(served["API server"]) as answer:
        pods = {pod["metadata"]["name"] for pod in json.load(answer)["items"]}
    kubeconfig_was_there = Path(served["kubeconfig"]).is_file()
    answer = CliRunner().invoke(main, ["explain", "whale", "--kubeconfig", served["kubeconfig"]]).output
    started = children(process)
    process.terminate()
    process.communicate(timeout=PATIENCE_SECONDS)
    return Run("".join(lines), process.returncode, pods, kubeconfig_was_there, answer, alive(started), folder.left)


def anonymous(line: str) -> str:
    """Leave out whose a strip's parts are: which of the pods that are alike runs first is not said."""
    return re.sub("[A-Z]", "#", line) if line.endswith("GiB") else line


class TestOutcome:
    """One whole run, in which real programs have shared made-up GPUs."""

    def test_nothing_disagreed(self, run: Run) -> None:
        assert 0 == run.status, run.text

    def test_all_pods_have_come_to_their_end(self, run: Run) -> None:
        # notebook, train, chat, etl, render, asr, tts, walled, legacy, summary, rerank and six taggers; whale; sneaky
        assert "= 19 pods: 17 placed, 1 waiting, 1 refused" in run.text
        # chat and etl have two containers each: 17 + 2
        assert "= 19 containers: annotation, environment and device ids agree in each" in run.text
        assert "= 17 API writes for 17 placed pods: one each" in run.text

    def test_memory_is_counted_once(self, run: Run) -> None:
        # 2 + 60 + (40 + 16) + a T4 of 14 + 12 + 9 + 11.69 of MIG + 6 * 6 + 50 + 80 + 12; etl has left
        assert "= 342 of 399 GiB in use on 9 GPUs" in run.text

    @pytest.mark.parametrize(
        ("container", "asks", "node"),
        [
            ("notebook/jupyter", "2 GiB", "gpu-t4-1"),
            ("train/ddp", "60 GiB", "gpu-a100-1"),
            ("chat/embed", "16 GiB", "gpu-a100-1"),
            ("etl/load", "24 GiB", "gpu-a100-1"),
            ("render/blender", "8 GiB", "gpu-t4-1"),
            ("legacy/main", "50 GiB", "gpu-h200-1"),
            ("rerank/main", "12 GiB", "gpu-a100-1"),
            ("asr/main", "12 GiB", "gpu-a30-1"),
            ("walled/main", "2g.12gb", "gpu-a30-1"),
        ],
    )
    def test_pods_go_where_they_leave_the_least_behind(self, run: Run, container: str, asks: str, node: str) -> None:
        assert re.search(rf" {asks} +{node} .* =$", run.row(container)), run.row(container)

    def test_each_of_two_gpus_has_its_own_line(self, run: Run) -> None:
        first, second = run.text.split("train/ddp")[1].splitlines()[:2]
        assert re.search(r" 0  GPU-\w+~ +30 ids  =$", first)
        assert re.match(r" +1  GPU-\w+~ +30 ids  =$", second)

    def test_a_limit_is_shown_where_mps_reads_it_and_nowhere_else(self, run: Run) -> None:
        # 12 and 9 GiB; no daemon reads what stands in the environments of the others
        limited = [line.split("/")[0][2:] for line in run.text.splitlines() if re.search(r" 0=\d+M +\d+ ids ", line)]
        assert ["asr", "tts"] == limited
        assert "  0=12288M  12 ids  =" in run.row("asr/main")

    def test_a_pod_that_waits_says_why_in_the_schedulers_words(self, run: Run) -> None:
        text = " ".join(run.text.split())
        insufficient = "3 Insufficient cotenant.io/gpu-mem."
        assert f"whale waits: 0/4 nodes are available: 1 the request is larger than any GPU, {insufficient}" in text
        assert (
            f"rerank waits: 0/4 nodes are available: 1 no single GPU has the requested memory free, {insufficient}"
            in text
        )

    def test_why_it_waits_can_be_asked_as_of_a_cluster(self, run: Run) -> None:
        assert "default/whale asks 150 GiB: waiting, fits on none of 4 GPU nodes" in run.answer
        assert "best: gpu-h200-1 GPU 0 has 139 GiB in all" in run.answer

    def test_a_pod_that_takes_what_it_was_not_given_is_refused(self, run: Run) -> None:
        assert "sneaky is refused: admission webhook" in " ".join(run.text.split())

    def test_the_readme_shows_what_it_prints(self, run: Run) -> None:
        readme = (Path(__file__).parent.parent.parent / "README.md").read_text()
        _, excerpt, *_ = readme.split("```\n")
        assert {*map(anonymous, excerpt.splitlines())} <= {*map(anonymous, run.text.splitlines())}

    def test_plain_is_ascii_of_80_columns(self, run: Run) -> None:
        assert run.text.isascii()
        assert "\x1b" not in run.text
        assert [] == [line for line in run.text.splitlines() if len(line) > 80 and not line.startswith("  logs")]

    def test_it_stays_up_with_the_pods_that_are_left(self, run: Run) -> None:
        assert run.kubeconfig_was_there
        # 19, of which sneaky was refused and etl deleted
        assert 17 == len(run.pods)
        assert {"notebook", "whale", "rerank"} < run.pods
        assert {"sneaky", "etl"}.isdisjoint(run.pods)

    def test_no_process_and_no_file_is_left(self, run: Run) -> None:
        assert ([], []) == (run.left_running, run.left_in_folder)


class TestEnd:
    """However it ends, no process and no file stays behind."""

    def test_ctrl_c_while_it_starts(self, folder: Folder) -> None:
        process = start(folder, "--plain")
        assert process.stdout is not None
        while "cotenant-" not in process.stdout.readline():  # the first program that is ready; all are started by then
            assert process.poll() is None
        started = children(process)
        assert 5 == len(started)
        os.killpg(process.pid, signal.SIGINT)
        process.communicate(timeout=PATIENCE_SECONDS)
        assert 130 == process.returncode
        assert [] == alive(started)
        assert [] == folder.left

    def test_a_reader_that_leaves(self, folder: Folder) -> None:
        process = start(folder, "--plain")
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        assert 1 == process.wait(timeout=PATIENCE_SECONDS)
        assert [] == folder.left

    def test_a_temporary_folder_too_deep_for_sockets(self, tmp_path: Path) -> None:
        process = start(Folder(str(tmp_path)), "--plain")
        text, _ = process.communicate(timeout=PATIENCE_SECONDS)
        assert 1 == process.returncode
        assert "too long a name for sockets: set TMPDIR to a shorter" in text
        assert [] == list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        ("most", "why"),
        # Python looks for a folder by writing four bytes; a kubeconfig has more
        [(0, "No usable temporary directory found in"), (4, "File too large")],
    )
    def test_a_temporary_folder_without_room(self, folder: Folder, most: int, why: str) -> None:
        with no_file_beyond(most):
            process = start(folder, "--plain")
        text, _ = process.communicate(timeout=PATIENCE_SECONDS)
        assert 1 == process.returncode
        assert text.startswith(f"The demo cannot go on: its files cannot be written: {why}")
        assert text.endswith("; set TMPDIR to a folder with room\n")
        assert [] == folder.left


class TestChildren:
    """Programs that do not start are told of with their last words."""

    def test_a_program_that_ends_at_once(self, tmp_path: Path) -> None:
        children = Children(tmp_path)
        with pytest.raises(DemoError, match=r"x ended with status 1 before it was ready; its last words:\n  no driver"):
            children.start("x", "python", "-c", "import sys; sys.exit('no driver')", ready="ready")
        assert ["x"] == children.ended()
        children.end()

    def test_a_program_that_is_not_installed(self, tmp_path: Path) -> None:
        with pytest.raises(DemoError, match="no-such-program is not installed in"):
            Children(tmp_path).start("x", "no-such-program", ready="ready")

    def test_nothing_is_started_after_the_end(self, tmp_path: Path) -> None:
        children = Children(tmp_path)
        children.end()
        with pytest.raises(DemoError, match="the demo is ending"):
            children.start("x", "python", "-c", "", ready="ready")


def test_the_version_is_printed() -> None:
    assert __version__ == subprocess.check_output([COTENANT, "version"], text=True).strip()


def test_where_there_is_no_room_for_what_is_printed_a_sentence_says_so() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([COTENANT, "version"], stdout=full, stderr=subprocess.PIPE, text=True, check=False)

    told = "Error: the output cannot be written: No space left on device; have it written elsewhere\n"
    assert (1, told) == (done.returncode, done.stderr)
