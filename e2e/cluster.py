"""The real control plane on loopback: etcd, kube-apiserver and, where asked, kube-scheduler.

`with ControlPlane(directory) as cluster:` starts it in a few seconds, on free ports, so that several can run
at once. Everything that it writes lies in `directory`; it signals no process but its own.
"""

import http.client
import os
import secrets
import signal
import ssl
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Self

import yaml

from e2e import audit
from e2e.processes import Program, find_program, free_ports
from e2e.rest import Api, ApiError

NODE_NAME = "real-0"
"""Name of the node that e2e.node joins: a token's user has to be known when the API server starts."""


@dataclass(frozen=True, slots=True)
class User:
    """A user known by token: tests call it `name`, the API server knows it by `username` and `groups`."""

    name: str
    username: str
    groups: tuple[str, ...] = ()
    token: str = field(default_factory=partial(secrets.token_hex, 16))


def default_users() -> tuple[User, ...]:
    """Return the users of a ground where RBAC stands in nobody's way but the scheduler's and the kubelet's.

    For RBAC as shipped, apply the manifests and take kubeconfigs from
    `ControlPlane.service_account_kubeconfig`, or pass users without system:masters.
    """
    return (
        User("admin", "admin", ("system:masters",)),
        User("scheduler", "system:kube-scheduler"),
        User("kubelet", f"system:node:{NODE_NAME}", ("system:nodes",)),
        User("extender", "system:serviceaccount:cotenant-system:cotenant-extender", ("system:masters",)),
        User("plugin", "system:serviceaccount:cotenant-system:cotenant-device-plugin", ("system:masters",)),
    )


@dataclass(frozen=True, slots=True)
class Scheduler:
    """A running kube-scheduler."""

    program: Program
    port: int
    token: str

    def ready(self) -> bool:
        """Whether its informers have synced."""
        return self._get("/readyz") is not None

    def metrics(self) -> str:
        """Return its Prometheus metrics as text; raise ConnectionError where it does not answer."""
        text = self._get("/metrics")
        if text is None:
            raise ConnectionError(f"kube-scheduler on port {self.port} gives no metrics, see {self.program.log}")
        return text

    def _get(self, path: str) -> str | None:
        # The serving certificate is made by the scheduler in memory and signed by nobody.
        unverified = ssl._create_unverified_context()
        connection = http.client.HTTPSConnection("127.0.0.1", self.port, context=unverified, timeout=10)
        try:
            connection.request("GET", path, headers={"Authorization": f"Bearer {self.token}"})
            response = connection.getresponse()
            text = response.read().decode()
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()
        return text if response.status == http.HTTPStatus.OK else None


class ControlPlane:
    """A running etcd and kube-apiserver, with the schedulers that were started on them."""

    def __init__(
        self,
        directory: Path,
        *,
        users: Sequence[User] | None = None,
        service_accounts: bool = False,
        api_server_flags: Sequence[str] = (),
    ) -> None:
        """Prepare a control plane in `directory`, which is made where it is missing.

        TaintNodesByCondition is off: without a controller manager nothing would take the not-ready taint from a new
        node again. `service_accounts` turns ServiceAccount on: pods need an account that exists, which is made by a
        controller, and get its token.
        """
        self.directory = directory
        self.users = {user.name: user for user in (default_users() if users is None else users)}
        self._admission_off = ["TaintNodesByCondition", *([] if service_accounts else ["ServiceAccount"])]
        self._flags = list(api_server_flags)
        self._programs: list[Program] = []
        self._schedulers = 0
        self._etcd_port, self._etcd_peer_port, self.port = free_ports(3)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    @property
    def ca_file(self) -> Path:
        """The serving certificate that kube-apiserver makes, followed by the CA that signed it."""
        return self.directory / "certs" / "apiserver.crt"

    @property
    def audit_log(self) -> Path:
        return self.directory / "audit.log"

    def start(self) -> None:
        """Start etcd and kube-apiserver and wait until both serve; on failure nothing is left running."""
        etcd, api_server = find_program("etcd"), find_program("kube-apiserver")
        (self.directory / "certs").mkdir(parents=True, exist_ok=True)
        try:
            self._start_etcd(etcd)
            self._start_api_server(api_server)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop all programs, the latest first; etcd is killed, since nobody reads its data again."""
        while self._programs:
            program = self._programs.pop()
            if program.name == "etcd":
                program.kill()
            else:
                program.stop(patience_s=5)

    def pid(self, name: str) -> int:
        """Return the process of etcd or kube-apiserver."""
        return self._program(name).pid

    def restart_api_server(self) -> None:
        """Stop kube-apiserver and start it again on the same data; everybody else connects anew."""
        running = self._program("kube-apiserver")
        place = self._programs.index(running)
        self._programs.remove(running)
        running.stop(patience_s=5)
        self._start_api_server(find_program("kube-apiserver"))
        self._programs.insert(place, self._programs.pop())

    def freeze_etcd(self, seconds: float) -> None:
        """Stop etcd for so long in the middle of what it does; kube-apiserver answers only what it has cached."""
        etcd = self.pid("etcd")
        os.kill(etcd, signal.SIGSTOP)
        try:
            time.sleep(seconds)
        finally:
            os.kill(etcd, signal.SIGCONT)

    def _program(self, name: str) -> Program:
        (running,) = [program for program in self._programs if program.name == name]
        return running

    def _start_etcd(self, binary: Path) -> None:
        client, peer = (f"http://127.0.0.1:{port}" for port in (self._etcd_port, self._etcd_peer_port))
        etcd = Program(
            [
                binary,
                f"--data-dir={self.directory / 'etcd'}",
                f"--listen-client-urls={client}",
                f"--advertise-client-urls={client}",
                f"--listen-peer-urls={peer}",
                f"--initial-advertise-peer-urls={peer}",
                f"--initial-cluster=default={peer}",
                "--quota-backend-bytes=8589934592",
                "--unsafe-no-fsync",
            ],
            log=self.directory / "etcd.log",
        )
        self._programs.append(etcd)
        etcd.wait_ready(lambda: _answers_http(self._etcd_port, "/health"))

    def _start_api_server(self, binary: Path) -> None:
        certs, policy, tokens = (self.directory / name for name in ("certs", "audit-policy.yaml", "tokens.csv"))
        signing_key = certs / "service-account.key"
        if not signing_key.exists():  # tokens outlive a restart
            _make_key(signing_key)
        policy.write_text(audit.POLICY)
        tokens.write_text("".join(_token_line(user) for user in self.users.values()))
        tokens.chmod(0o600)
        api_server = Program(
            [
                binary,
                f"--etcd-servers=http://127.0.0.1:{self._etcd_port}",
                "--bind-address=127.0.0.1",
                "--advertise-address=127.0.0.1",
                f"--secure-port={self.port}",
                f"--cert-dir={certs}",
                f"--service-account-key-file={signing_key}",
                f"--service-account-signing-key-file={signing_key}",
                "--service-account-issuer=https://kubernetes.default.svc",
                "--service-cluster-ip-range=10.0.0.0/24",
                # A loopback address is no valid endpoint of the service `kubernetes`.
                "--endpoint-reconciler-type=none",
                "--authorization-mode=Node,RBAC",
                "--allow-privileged=true",  # as kubeadm has it; the plugin is privileged under MPS
                f"--token-auth-file={tokens}",
                f"--disable-admission-plugins={','.join(self._admission_off)}",
                f"--audit-policy-file={policy}",
                f"--audit-log-path={self.audit_log}",
                "--audit-log-maxsize=100000",  # MiB: never rotated, the reader's offsets stay good
                "--max-requests-inflight=2000",
                "--max-mutating-requests-inflight=1000",
                *self._flags,
            ],
            log=self.directory / "kube-apiserver.log",
        )
        self._programs.append(api_server)
        api_server.wait_ready(self._ready)

    def _ready(self) -> bool:
        """Whether the API server says so, and has made the namespace that tests work in."""
        if not self.ca_file.exists():
            return False
        try:
            api = self.api()
            api.raw("GET", "/readyz")
            api.get("Namespace", "default")
        except (OSError, http.client.HTTPException, ApiError):
            return False
        return True

    def api(self, user: str = "admin") -> Api:
        """Return a REST client that calls as one of the users."""
        return Api(self.url, token=self.users[user].token, ca_file=self.ca_file)

    def kubeconfig(self, user: str = "admin") -> Path:
        """Write and return the kubeconfig of one of the users."""
        return self._kubeconfig(user, self.users[user].token)

    def service_account_kubeconfig(self, name: str, *, namespace: str, pod: str | None = None) -> Path:
        """Return the kubeconfig of a ServiceAccount that exists, so that the RBAC as shipped is what holds.

        With `pod` the token is bound to that pod of the namespace, and names its node to admission policies.
        """
        spec: dict[str, Any] = {"expirationSeconds": 86400}
        if pod is not None:
            spec["boundObjectRef"] = {"apiVersion": "v1", "kind": "Pod", "name": pod}
        review = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec}
        answer = self.api().call("POST", f"/api/v1/namespaces/{namespace}/serviceaccounts/{name}/token", review)
        return self._kubeconfig(".".join(filter(None, (namespace, name, pod))), answer["status"]["token"])

    def _kubeconfig(self, name: str, token: str) -> Path:
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [
                {
                    "name": "e2e",
                    "cluster": {"server": self.url, "certificate-authority": str(self.ca_file.resolve())},
                }
            ],
            "users": [{"name": name, "user": {"token": token}}],
            "contexts": [{"name": "e2e", "context": {"cluster": "e2e", "user": name}}],
            "current-context": "e2e",
        }
        path = self.directory / f"{name}.kubeconfig"
        path.write_text(yaml.safe_dump(config))
        path.chmod(0o600)
        return path

    def audit(self, *, offset: int = 0) -> tuple[list[audit.Write], int]:
        """Return the writes logged from byte `offset` on, and the offset to go on from.

        The server logs a write when its answer is complete, which the caller may see a moment earlier.
        """
        return audit.read(self.audit_log, offset=offset)

    def start_scheduler(self, config: Path | str | Mapping[str, Any]) -> Scheduler:
        """Start a kube-scheduler with a KubeSchedulerConfiguration: a path, YAML text, or the object.

        Its kubeconfig is filled in, and leader election is off unless the configuration says otherwise.
        """
        binary = find_program("kube-scheduler")
        if isinstance(config, Path):
            config = config.read_text()
        settings = dict(yaml.safe_load(config) if isinstance(config, str) else config)
        kubeconfig = self.kubeconfig("scheduler")
        settings["clientConnection"] = {**settings.get("clientConnection", {}), "kubeconfig": str(kubeconfig)}
        settings.setdefault("leaderElection", {"leaderElect": False})
        self._schedulers += 1
        name = f"kube-scheduler-{self._schedulers}"
        path = self.directory / f"{name}.yaml"
        path.write_text(yaml.safe_dump(settings))
        (port,) = free_ports(1)
        program = Program(
            [
                binary,
                f"--config={path}",
                f"--authentication-kubeconfig={kubeconfig}",
                f"--authorization-kubeconfig={kubeconfig}",
                "--bind-address=127.0.0.1",
                f"--secure-port={port}",
                f"--cert-dir={self.directory / f'{name}.certs'}",
            ],
            log=self.directory / f"{name}.log",
        )
        self._programs.append(program)
        scheduler = Scheduler(program, port, self.users["admin"].token)
        program.wait_ready(scheduler.ready)
        return scheduler

    @contextmanager
    def scheduling(self, config: Path | str | Mapping[str, Any]) -> Iterator[Scheduler]:
        """Run a kube-scheduler as start_scheduler does, for as long as the context lasts, however that ends."""
        scheduler = self.start_scheduler(config)
        try:
            yield scheduler
        finally:
            self.stop_scheduler(scheduler)

    def stop_scheduler(self, scheduler: Scheduler) -> None:
        """Stop one scheduler."""
        self._programs.remove(scheduler.program)
        scheduler.program.stop(patience_s=5)


def _token_line(user: User) -> str:
    groups = ",".join(user.groups)
    return f'{user.token},{user.username},{user.name},"{groups}"\n'


def _make_key(path: Path) -> None:
    openssl = find_program("openssl")
    subprocess.run(
        [openssl, "genpkey", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048", "-out", path],
        check=True,
        capture_output=True,
    )


def _answers_http(port: int, path: str) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == http.HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
