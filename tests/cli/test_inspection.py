"""`cotenant inspect`, `cotenant explain` and the kubectl plugin, against a real extender."""

import csv
import io
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import yaml
from click.testing import CliRunner, Result

from cotenant.cli.main import main
from cotenant.contract.reasons import Reason
from cotenant.contract.units import GIB
from cotenant.standins.api_server import ApiServer
from tests.builders import a_node, a_pod
from tests.cli.service_proxy import ROOT, ServiceProxy
from tests.extender.running import Running, add, call, eventually, submit

PLUGIN = Path(__file__).parents[2] / "scripts" / "kubectl-gpumem"


@pytest.fixture(scope="module")
def extender(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """An extender with 2 GPUs of 10 GiB on each of n1 and n2, 6 GiB held by train, and a pod that asks 11."""
    with ApiServer() as api:
        add(api, a_node("n1").with_gpus(2, "10GiB"), a_node("n2").with_gpus(2, "10GiB"))
        with Running(api, tmp_path_factory.mktemp("extender")) as running:
            assert "" == running.bind(submit(api, a_pod().named("train").asking(6)), "n1")
            waits = submit(api, a_pod().named("waits").in_namespace("team-a").asking(11))
            assert eventually(lambda: running.ledger.waiting(waits["metadata"]["uid"]))
            assert eventually(lambda: running.get("/v1/pods?state=bound").json["items"])
            yield running


@pytest.fixture
def proxy(extender: Running) -> Iterator[ServiceProxy]:
    with ServiceProxy(extender.other_address) as proxy:
        yield proxy


def cotenant(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


class TestCommands:
    """The commands print what the extender says."""

    def test_nodes_are_printed_as_a_table(self, extender: Running) -> None:
        result = cotenant("inspect", "nodes", "--server", f"http://{extender.other_address}")
        assert (0, extender.get("/v1/nodes?as=table").body.decode()) == (result.exit_code, result.output)

    def test_an_explanation_names_what_would_help(self, extender: Running) -> None:
        result = cotenant("explain", "pod/waits", "-n", "team-a", "--server", extender.other_address)
        assert "10 GiB fit now on n1 GPU 1" in result.output
        assert Reason.TOO_LARGE.sentence in result.output

    def test_pods_of_one_state_are_listed_alone(self, extender: Running) -> None:
        server = ("--server", extender.other_address)
        for state, names in (("waiting", ["waits"]), ("bound", ["train"]), ("ungranted", [])):
            result = cotenant("inspect", "pods", "--state", state, "-o", "json", *server)
            assert names == [pod["name"] for pod in msgspec.json.decode(result.output)["items"]]

    def test_pods_of_one_namespace_are_listed_alone_and_those_of_all_when_asked(self, extender: Running) -> None:
        for where, names in (((), {"train", "waits"}), (("-n", "team-a"), {"waits"}), (("-A",), {"train", "waits"})):
            result = cotenant("inspect", "pods", *where, "-o", "json", "--server", extender.other_address)
            assert names == {pod["name"] for pod in msgspec.json.decode(result.output)["items"]}

    def test_pods_can_be_read_by_programs(self, extender: Running) -> None:
        said = {}
        for output in ("json", "yaml", "csv"):
            result = cotenant("inspect", "pods", "-o", output, "--server", extender.other_address)
            assert 0 == result.exit_code
            said[output] = result.output
        rows = msgspec.json.decode(said["json"])["items"]
        assert rows == yaml.safe_load(said["yaml"])["items"]
        assert ["train", "waits"] == [row["name"] for row in rows]
        table = list(csv.DictReader(io.StringIO(said["csv"])))
        assert [str(6 * GIB), ""] == [row["bytes"] for row in table]

    def test_the_api_servers_proxy_leads_to_the_extender(self, proxy: ServiceProxy, tmp_path: Path) -> None:
        config = proxy.kubeconfig(tmp_path / "config")
        result = cotenant("inspect", "nodes", "--kubeconfig", config, "--context", "here", "--filter", "n2")
        assert (0, 2) == (result.exit_code, result.output.count("\nn2"))
        assert "\nn1" not in result.output

    def test_errors_are_what_the_extender_or_the_api_server_says(self, proxy: ServiceProxy, tmp_path: Path) -> None:
        here = ("--kubeconfig", proxy.kubeconfig(tmp_path / "config"), "--context", "here")
        unknown = cotenant("explain", "nobody", *here)
        assert 1 == unknown.exit_code
        assert unknown.output.startswith("Error: no pod 'nobody' in namespace 'default' asks for shared GPU memory now")
        config = yaml.safe_load(Path(here[1]).read_text())
        next(one for one in config["contexts"] if one["name"] == "here")["context"]["namespace"] = "team-a"
        Path(here[1]).write_text(yaml.safe_dump(config))
        assert "in namespace 'team-a'" in cotenant("explain", "nobody", *here).output
        assert "in namespace 'team-b'" in cotenant("explain", "nobody", "-n", "team-b", *here).output
        elsewhere = cotenant("inspect", "nodes", *here, "--service", "kube-system/http:cotenant-extender:serve")
        said = 'Error: services "cotenant-extender" not found: name it by --service where Cotenant was installed'
        assert (1, said) == (elsewhere.exit_code, elsewhere.output[: len(said)])

    @pytest.mark.parametrize("pod", ["default/train", "pod/", ""])
    @pytest.mark.parametrize("command", ["explain", "grow"])
    def test_what_is_no_pods_name_is_refused(self, command: str, pod: str) -> None:
        result = cotenant(command, pod, "--server", "127.0.0.1:1")
        assert 2 == result.exit_code
        assert f"{pod!r} is no pod's name; of which namespace it is, --namespace says" in result.output

    @pytest.mark.parametrize(
        ("code", "said", "then"),
        [
            (
                503,
                'no endpoints available for service "http:cotenant-extender:serve"',
                "see kubectl -n cotenant-system",
            ),
            (503, "error trying to reach service: dial tcp 10.0.0.9:9481: i/o timeout", "the extender does not run"),
            (
                403,
                'services "http:cotenant-extender:serve" is forbidden: User "ada" cannot get resource "services/proxy"',
                "the Role cotenant-viewer of namespace cotenant-system allows it",
            ),
            (401, "Unauthorized", "the kubeconfig's credentials are missing, wrong or expired"),
        ],
    )
    def test_where_the_extender_is_not_reached_it_is_said_what_to_do(
        self, tmp_path: Path, code: int, said: str, then: str
    ) -> None:
        with ApiServer() as api:
            api.faults.refuse(code, message=said, path="/proxy/", times=2)  # it tries again with credentials read anew
            result = cotenant("explain", "train", "--kubeconfig", api.kubeconfig(tmp_path / "config", user="ada"))
        assert 1 == result.exit_code
        assert result.output.startswith(f"Error: {said}: ")
        assert then in result.output

    def test_in_a_pod_without_a_kubeconfig_the_service_account_is_taken(self, tmp_path: Path) -> None:
        pod = {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": "1"}
        environment = {**pod, "HOME": str(tmp_path), "KUBECONFIG": None}
        for command in (["doctor"], ["explain", "train"], ["snapshot", "--out", str(tmp_path / "cluster.json")]):
            result = CliRunner().invoke(main, command, env=environment)
            assert "Error: the pod's service account cannot be used: Service token file" in result.output

    def test_what_the_client_warns_of_is_not_among_what_is_printed(self, proxy: ServiceProxy, tmp_path: Path) -> None:
        config = Path(proxy.kubeconfig(tmp_path / "config"))
        config.write_text(config.read_text().replace("token: t", "username: u"))
        result = cotenant("inspect", "nodes", "-o", "json", "--kubeconfig", str(config), "--context", "here")
        assert ["n1", "n2"] == [node["node"] for node in msgspec.json.decode(result.stdout)["items"]]
        said = f"warning: no credentials were found, requests are anonymous (the kubeconfig file {config})\n"
        assert said == result.stderr

    @pytest.mark.parametrize(
        ("server", "why"),
        [
            ("127.0.0.1:1", "does not answer"),
            ("ftp://there", "is not a URL such as"),
            ("http://[", "is not a URL such as"),
        ],
    )
    def test_a_server_that_is_none_is_said_to_be_so(self, server: str, why: str) -> None:
        result = cotenant("inspect", "nodes", "--server", server)
        assert result.exit_code in {1, 2}
        assert why in result.output

    @pytest.mark.parametrize("service", ["foo", "/foo", "foo/", "a/b/c"])
    def test_a_service_without_its_namespace_is_refused(self, service: str) -> None:
        for command in (["inspect", "nodes"], ["doctor"]):
            result = cotenant(*command, "--service", service)
            assert 2 == result.exit_code
            assert "expected NAMESPACE/SCHEME:NAME:PORT, such as cotenant-system/http:cotenant" in result.output

    def test_with_wide_every_gpu_is_explained(self, extender: Running) -> None:
        result = cotenant("explain", "waits", "-n", "team-a", "-o", "wide", "--server", extender.other_address)
        lines = [line.split() for line in result.output.splitlines()]
        gpus = [(line[0], line[1], line[-2], line[-1]) for line in lines if line and line[0] in {"n1", "n2"}]
        # 11 GiB of 10
        assert [(node, gpu, "1Gi", Reason.TOO_LARGE) for node in ("n1", "n2") for gpu in ("0", "1")] == gpus

    def test_all_pages_are_printed_as_one(self, extender: Running) -> None:
        from cotenant.cli import inspection  # noqa: PLC0415 - as the command does

        ask = inspection.by_url(extender.other_address)
        told = msgspec.json.decode(inspection.nodes(ask, "json", {"limit": "1"}))
        assert (["n1", "n2"], 0, "") == ([n["node"] for n in told["items"]], told["remaining"], told["continue"])
        one_by_one = inspection.explanation(
            lambda path, query: ask(path, {**query, "limit": "1"}), "json", "team-a", "waits"
        )
        assert ["n1", "n2"] == [node["node"] for node in msgspec.json.decode(one_by_one)["nodes"]]


class Kubectl:
    """A stand-in for kubectl that writes down how it is called."""

    def __init__(self, directory: Path) -> None:
        self._calls = directory / "calls"
        self._directory = directory
        script = directory / "kubectl"
        script.write_text(
            '#!/bin/sh\ncase "$*" in *"config view"*) printf team-a; exit;; esac\n'
            f"printf '%s\\n' \"$@\" >>'{self._calls}'\n"
        )
        script.chmod(0o755)

    def gpumem(self, *arguments: str, shell: str = "sh", **environment: str) -> tuple[int, str, list[str]]:
        """Run the plugin; give its status, its words, and the arguments that kubectl got."""
        self._calls.unlink(missing_ok=True)
        path = f"{self._directory}:{os.environ['PATH']}"
        done = subprocess.run(
            [shell, str(PLUGIN), *arguments],
            env={"PATH": path, **environment},
            capture_output=True,
            text=True,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        called = self._calls.read_text().splitlines() if self._calls.exists() else []
        return done.returncode, done.stdout + done.stderr, called


def run_plugin(directory: Path, *arguments: str, shell: str = "sh") -> subprocess.CompletedProcess[str]:
    """Run the plugin with the kubectl that lies in *directory*."""
    return subprocess.run(
        [shell, str(PLUGIN), *arguments],
        env={"PATH": f"{directory}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )


@pytest.fixture
def kubectl(tmp_path: Path) -> Kubectl:
    return Kubectl(tmp_path)


class TestPlugin:
    """kubectl gpumem asks the extender through kubectl."""

    @pytest.mark.parametrize("shell", ["sh", "dash", "bash"])
    def test_it_is_a_script_of_any_posix_shell(self, shell: str) -> None:
        if shutil.which(shell) is None:
            pytest.skip(f"there is no {shell} on this machine")
        subprocess.run([shell, "-n", str(PLUGIN)], check=True)

    @pytest.mark.parametrize(
        ("arguments", "path", "shows"),
        [
            (("nodes",), "/v1/nodes?as=table", "CLUSTER: 2 nodes, 4 GPUs"),
            (("nodes", "-o", "wide", "--filter", "n2"), "/v1/nodes?as=wide", "GPU-n2-1"),
            (("pods", "-A", "-ocsv"), "/v1/pods?as=csv", "default,train,"),
            (("pods", "-A", "--state", "waiting"), "/v1/pods?as=table", "team-a      waits   waiting"),
            (("pods", "-A", "--state=ungranted"), "/v1/pods?as=table", "No pods found that ask for GPU memory."),
            (("pods", "-A", "--output=yaml"), "/v1/pods?as=yaml", "name: train"),
            (("explain", "waits"), "/v1/explain/team-a/waits?as=table", "team-a/waits asks 11 GiB: waiting"),
            (("explain", "pod/train", "--namespace=default"), "/v1/explain/default/train?", "holds 6 GiB of GPU 0"),
            # as kubectl's own short flags can be written
            (("explain", "train", "-n=default", "-o=yaml"), "/v1/explain/default/train?as=yaml", "name: train"),
        ],
    )
    def test_what_it_asks_for_is_what_the_extender_answers(
        self, extender: Running, kubectl: Kubectl, arguments: tuple[str, ...], path: str, shows: str
    ) -> None:
        status, _, called = kubectl.gpumem(*arguments)
        assert (0, ["get", "--raw"]) == (status, called[:2])
        asked = called[2].removeprefix(ROOT)
        assert asked.startswith(path)
        answer = call(extender.other_address, "GET", asked)
        assert 200 == answer.status
        assert shows in answer.body.decode()

    def test_the_users_context_is_used(self, kubectl: Kubectl) -> None:
        _, _, called = kubectl.gpumem("nodes", "--context", "prod", "--kubeconfig=/tmp/my config")
        assert ["--context=prod", "--kubeconfig=/tmp/my config", "get", "--raw"] == called[:4]

    def test_no_argument_can_leave_its_place_in_the_path(self, kubectl: Kubectl) -> None:
        _, _, called = kubectl.gpumem("explain", "a/b?c=d&e %20\u00e9", "-n", "x")
        assert "/v1/explain/x/a%2fb%3fc%3dd%26e%20%2520%c3%a9?" in called[2]

    @pytest.mark.parametrize(
        ("arguments", "why"),
        [
            ((), "Usage:"),
            (("watch",), "unknown command watch: it is nodes, pods, namespaces, explain, simulate or top"),
            (("simulate",), "simulate which pod?"),
            (("explain",), "explain which pod?"),
            (("nodes", "-o", "xml"), "-o xml is none of wide, json, yaml, csv"),
            (("nodes", "--filter"), "--filter needs a value"),
            (("top", "-o", "json"), "top prints a table; kubectl gpumem nodes -o json has what is in use"),
            (("nodes", "--what"), "unknown flag --what"),
        ],
    )
    def test_what_it_cannot_do_it_says(self, kubectl: Kubectl, arguments: tuple[str, ...], why: str) -> None:
        status, said, called = kubectl.gpumem(*arguments)
        assert (2, []) == (status, called)
        assert why in said

    def test_a_service_without_its_namespace_is_refused(self, kubectl: Kubectl) -> None:
        status, said, called = kubectl.gpumem("nodes", COTENANT_SERVICE="foo")
        assert (2, []) == (status, called)
        assert "COTENANT_SERVICE=foo is no NAMESPACE/SCHEME:NAME:PORT" in said

    @pytest.mark.parametrize("command", [("nodes",), ("pods", "-A", "-o", "csv"), ("top",)])
    @pytest.mark.parametrize(
        ("said", "then"),
        [
            ('(ServiceUnavailable): no endpoints available for service "http:cotenant-extender:serve"', "does not run"),
            ('(NotFound): services "cotenant-extender" not found', "name it by COTENANT_SERVICE"),
            (
                '(Forbidden): services "http:cotenant-extender:serve" is forbidden: User "ada"',
                "the Role cotenant-viewer",
            ),
        ],
    )
    def test_where_the_extender_is_not_reached_it_says_what_to_do(
        self, tmp_path: Path, command: tuple[str, ...], said: str, then: str
    ) -> None:
        script = tmp_path / "kubectl"
        script.write_text(
            f"#!/bin/sh\ncase \"$*\" in *'get pods'*) ;; *) echo 'Error from server {said}' >&2; exit 1 ;; esac\n"
        )
        script.chmod(0o755)
        done = run_plugin(tmp_path, *command)
        assert (1, "") == (done.returncode, done.stdout)
        first, second = done.stderr.splitlines()
        assert f"Error from server {said}" == first
        assert second.startswith("kubectl gpumem: ")
        assert then in second

    @pytest.mark.parametrize("flag", ["-fpod.yaml", "-f=pod.yaml", "--filename=pod.yaml"])
    def test_simulate_takes_its_file_as_kubectl_does(self, kubectl: Kubectl, flag: str) -> None:
        _, _, called = kubectl.gpumem("simulate", flag)
        assert "--filename=pod.yaml" in called

    @pytest.mark.parametrize(("units", "status"), [(3, 0), (11, 1)])
    def test_simulate_has_admission_ready_the_pod_and_ends_as_it_fits(
        self, extender: Running, tmp_path: Path, units: int, status: int
    ) -> None:
        pod = msgspec.json.encode(a_pod().named("new").asking(units).as_json()).decode()
        said = call(extender.other_address, "POST", "/v1/simulate?as=table", pod.encode()).body.decode()
        script = tmp_path / "kubectl"
        posted = tmp_path / "posted"
        script.write_text(
            '#!/bin/sh\ncase "$*" in\n'
            f"*--dry-run=server*--filename=pod.yaml*) cat <<'EOF'\n{pod}\nEOF\n;;\n"
            f"*--raw*/v1/simulate*) cat >'{posted}'; cat <<'EOF'\n{said}EOF\n;;\nesac\n"
        )
        script.chmod(0o755)
        done = run_plugin(tmp_path, "simulate", "-f", "pod.yaml", "-n", "x")
        assert (status, pod) == (done.returncode, posted.read_text())
        assert said.strip() == done.stdout.strip()

    @pytest.mark.parametrize("shell", ["sh", "dash", "bash"])
    def test_csv_and_top_go_on_to_the_last_page(self, extender: Running, tmp_path: Path, shell: str) -> None:
        if shutil.which(shell) is None:
            pytest.skip(f"there is no {shell} on this machine")
        whole, first, last = (
            call(extender.other_address, "GET", f"/v1/nodes?as=csv{page}").body.decode()
            for page in ("", "&limit=1", "&limit=1&continue=n1")
        )
        script = tmp_path / "kubectl"
        script.write_text(
            '#!/bin/sh\ncase "$*" in\n'
            "*'get pods'*) ;;\n"
            f"*/nodes?as=csv*'&filter=n&continue=n1') cat <<'EOF'\n{last}EOF\n;;\n"
            f"*/nodes?as=csv*'&filter=n&continue=') cat <<'EOF'\n{first}EOF\n;;\n"
            "*) exit 1 ;;\nesac\n"
        )
        script.chmod(0o755)
        assert whole == run_plugin(tmp_path, "nodes", "-o", "csv", "--filter", "n", shell=shell).stdout
        table = run_plugin(tmp_path, "top", "--filter=n", shell=shell).stdout.splitlines()[1:]
        assert ["n1", "n1", "n2", "n2"] == [line.split()[0] for line in table]

    def test_top_joins_what_is_used_with_what_was_given_away(self, extender: Running, tmp_path: Path) -> None:
        rows = call(extender.other_address, "GET", "/v1/nodes?as=csv").body.decode()
        metrics = (
            "# HELP cotenant_gpu_memory_used_bytes In use.\n"
            f'cotenant_gpu_memory_used_bytes{{gpu="0",model="A, B",uuid="GPU-n1-0"}} {7 * GIB / 2}\n'
            'cotenant_gpu_memory_total_bytes{gpu="0",uuid="GPU-n1-0"} 1.0\n'
        )
        script = tmp_path / "kubectl"
        script.write_text(
            '#!/bin/sh\ncase "$*" in\n'
            f"*'get pods'*) printf 'plugin-a plugin-b' ;;\n"
            f"*/nodes?as=csv*) cat <<'EOF'\n{rows}EOF\n;;\n"
            f"*pods/plugin-a:9482/proxy/metrics) cat <<'EOF'\n{metrics}EOF\n;;\n"
            "*) exit 1 ;;\nesac\n"
        )
        script.chmod(0o755)
        done = run_plugin(tmp_path, "top")
        table = [line.split() for line in done.stdout.splitlines()]
        assert ["NODE", "GPU", "USED", "ALLOCATED", "USABLE"] == table[0]
        used = {(row[0], row[1]): row[2] for row in table[1:]}
        assert {("n1", "0"): "3.5Gi", ("n1", "1"): "?", ("n2", "0"): "?", ("n2", "1"): "?"} == used
        # train holds 6 GiB of one GPU
        assert 1 == sum(row[3:] == ["6.0Gi", "10.0Gi"] for row in table)
        assert "plugin-b tells nothing" in done.stderr

    def test_help_ends_well(self, kubectl: Kubectl) -> None:
        status, said, _ = kubectl.gpumem("--help")
        assert 0 == status
        assert said.startswith("Show GPU memory shared by Cotenant.")

    def test_krew_installs_the_script_by_its_name(self) -> None:
        plugin = yaml.safe_load((PLUGIN.parent / "krew.yaml").read_text())
        assert "gpumem" == plugin["metadata"]["name"]
        (platform,) = plugin["spec"]["platforms"]
        assert PLUGIN.name == platform["bin"] == platform["files"][0]["from"]
