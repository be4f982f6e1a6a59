"""The course of the demo: submit pods, show what becomes of each, compare everything, free one, sum up."""

import time
from collections.abc import Sequence
from typing import Any

import msgspec

from cotenant.cli.demo import facts
from cotenant.cli.demo.children import DemoError
from cotenant.cli.demo.scene import Step
from cotenant.cli.demo.screen import Screen
from cotenant.cli.demo.stage import Stage, submit
from cotenant.cli.demo.strips import picture
from cotenant.cluster import ApiError
from cotenant.contract.environment import INJECTED
from cotenant.contract.grant import Role
from cotenant.contract.units import GIB, MIB, format_bytes

Json = dict[str, Any]

_PATIENCE_SECONDS = 30.0
# The pod that is deleted at the end, and the one that has waited for it.
LEAVES, FOLLOWS = "etl", "rerank"
_ROW = "{tag} {name:<17} {asks:>7}  {node:<10}  {gpu:>3}  {uuid:<13}  {limit:<9}  {ids:>7}  {mark}"


class Story:
    """Tell one run of the demo on *screen*; *problems* holds what disagreed, in sentences."""

    def __init__(self, stage: Stage, screen: Screen) -> None:
        self._stage = stage
        self._screen = screen
        self.problems: list[str] = []
        self._submitted = 0
        self._containers = 0
        self._placed: set[str] = set()
        self._waiting: set[str] = set()
        self._refused: set[str] = set()

    def introduce(self) -> None:
        """Show the empty GPUs."""
        self._screen.heading("The cluster")
        self._strips()

    def submit(self, steps: Sequence[Step]) -> None:
        """Submit everybody's pods, and show what becomes of each as it does."""
        self._screen.heading("Pods come, and say only how much GPU memory they want")
        for number, step in enumerate(steps):
            self._screen.line()
            self._screen.line(self._screen.dim(f"  {step.says}"))
            names = [name for pod in step.pods if (name := self._submit(pod, step))]
            if number == 1:
                self._screen.line()
            self._settle(names, step)
            if number == 0 and names:
                self._explain(names[0])
                self._screen.line()
                self._header()
                self._rows(names[0])
        self._screen.heading("Who holds what")
        self._strips()

    def free(self) -> None:
        """Delete a pod, and show the one that waited for its memory being placed."""
        self._screen.heading(f"Pod {LEAVES} is done; {FOLLOWS} has waited for its memory")
        self._stage.api.delete_pod(LEAVES)
        self._placed.discard(LEAVES)
        self._screen.line()
        if not self._stage.api.wait_until(lambda: self._runs(FOLLOWS), _PATIENCE_SECONDS):
            self._problem(f"pod {FOLLOWS} still waits, although {LEAVES} has left")
            return
        self._waiting.discard(FOLLOWS)
        self._rows(FOLLOWS)
        self._screen.line()
        self._strips()

    def sum_up(self, seconds: float) -> None:
        """Compare everything once more, and say how it went."""
        stage, screen = self._stage, self._screen
        placed = self._placed | {LEAVES}
        wrong_writes = facts.wrong_writes(stage, placed)
        nodes = facts.pictures(stage)
        gpus = [gpu for node in nodes for gpu in node.gpus]
        over = [gpu for gpu in gpus if gpu.used_bytes > gpu.usable_bytes]
        used, usable = sum(gpu.used_bytes for gpu in gpus), sum(gpu.usable_bytes for gpu in gpus)
        disagreed = len(self.problems)
        self.problems += wrong_writes
        self.problems += [f"a GPU holds {format_bytes(g.used_bytes)} of {format_bytes(g.usable_bytes)}" for g in over]
        self.problems += [f"{name} has ended by itself" for name in stage.children.ended()]
        plugin_writes = sum(write.resource == "nodes" and "plugin" in write.user for write in stage.api.writes)
        screen.heading("In the end")
        self._verdict(
            good=not disagreed,
            text=f"{self._submitted} pods: {len(placed)} placed, {len(self._waiting)} waiting, {len(self._refused)} refused",
        )
        self._verdict(
            good=not disagreed,
            text=f"{self._containers} containers: annotation, environment and device ids agree in each",
        )
        self._verdict(
            good=not over,
            text=f"{used // GIB} of {usable // GIB} GiB in use on {len(gpus)} GPUs; none holds more than it has",
        )
        self._verdict(
            good=not wrong_writes,
            text=f"{len(placed)} API writes for {len(placed)} placed pods: one each, node and grant together",
        )
        screen.line(screen.dim(f"    (beside them, {plugin_writes} writes of node annotations by the device plugins)"))
        for problem in self.problems:
            screen.line(screen.bad(f"  ✗ {problem}"))
        screen.line(screen.dim(f"  {seconds:.1f} s"))

    # One pod

    def _submit(self, pod: Json, step: Step) -> str | None:
        self._submitted += 1
        try:
            name: str = submit(self._stage, pod)["metadata"]["name"]
        except ApiError as error:
            name = pod["metadata"].get("name", "?")
            self._refused.add(name)
            self._screen.line(self._screen.bad(f"✗ {name}"))
            self._screen.wrapped(error.message, indent=4)
            if step.outcome != "refused":
                self._problem(f"pod {name} was refused")
            return None
        if step.outcome == "refused":
            self._problem(f"pod {name} was let in, but should have been refused")
        return name

    def _settle(self, names: Sequence[str], step: Step) -> None:
        """Wait until it is decided what becomes of each pod, and show it."""
        ends = time.monotonic() + _PATIENCE_SECONDS
        left = set(names)
        done = self._runs if step.outcome == "runs" else self._waits
        while left:
            settled = {name for name in left if done(name)}
            for name in sorted(settled):
                if step.outcome == "runs":
                    if self._submitted > 1:
                        self._rows(name)
                    self._placed.add(name)
                else:
                    self._show_waiting(name)
            left -= settled
            if left and not self._stage.api.wait_until(lambda: any(map(done, left)), ends - time.monotonic()):  # noqa: B023
                for name in left:
                    pod = self._stage.api.pod(name) or {}
                    self._problem(f"pod {name} is {facts.phase(pod)}: {_told(pod)}")
                return

    def _runs(self, name: str) -> bool:
        return facts.phase(self._stage.api.pod(name) or {}) == "Running"

    def _waits(self, name: str) -> bool:
        return bool(facts.why_waiting(self._stage.api.pod(name) or {}))

    def _pod(self, name: str) -> Json:
        pod = self._stage.api.pod(name)
        if pod is None:
            raise DemoError(f"pod {name} is gone")
        return pod

    # What is shown

    def _strips(self) -> None:
        for line in picture(facts.pictures(self._stage), self._screen.width, self._screen.brush):
            self._screen.line(line)
        if not self._screen.colour and (legend := self._screen.legend()):
            self._screen.line()
            self._screen.wrapped(legend, indent=2)

    def _header(self) -> None:
        heads = {"name": "POD/CONTAINER", "asks": "ASKS", "node": "NODE", "gpu": "GPU", "uuid": "VISIBLE GPU"}
        row = _ROW.format(tag=" ", **heads, limit="MPS LIMIT", ids="IDS", mark="")
        self._screen.line(self._screen.dim(row.rstrip()))

    def _rows(self, name: str) -> None:
        """Show a line for each container and each of its GPUs."""
        pod = self._pod(name)
        compared = facts.given(self._stage, pod)
        if not compared:
            self._problem(f"pod {name} runs without a readable grant")
        for container in compared:
            self._containers += 1
            unit = container.grant.units * self._unit(pod)
            limits = container.environment.get(INJECTED[1], "").split(",")
            visible = container.environment.get(INJECTED[0], "").split(",")
            of_gpu = len(container.ids) // len(container.gpus or (None,))
            whole = f"{name}/{container.container}" + (" init" if container.grant.role is Role.INIT else "")
            for number, gpu in enumerate(container.gpus):
                first = number == 0
                mark = self._screen.bad("✗") if container.disagreements else self._screen.good("✓")
                row = _ROW.format(
                    tag="@",
                    name=whole[:17] if first else "",
                    asks=format_bytes(unit) if first else "",
                    node=pod["spec"]["nodeName"] if first else "",
                    gpu=gpu.index,
                    uuid=f"{visible[number][:12]}…" if number < len(visible) else "",
                    limit=limits[number] if number < len(limits) else "",
                    ids=f"{of_gpu} ids",
                    mark=mark,
                )
                self._screen.line(row.replace("@", self._screen.tag(name) if first else " ", 1))
            for problem in container.disagreements:
                self._problem(f"pod {name}: {problem}")

    def _unit(self, pod: Json) -> int:
        inventory = self._stage.inventory(pod["spec"]["nodeName"])
        return inventory.unit_bytes if inventory else GIB

    def _show_waiting(self, name: str) -> None:
        self._waiting.add(name)
        self._screen.line(self._screen.waiting(f"? {name} waits"))
        self._screen.wrapped(facts.why_waiting(self._pod(name)), indent=4)

    def _explain(self, name: str) -> None:
        """Follow one pod from what its user wrote to what its container sees."""
        pod, names = self._pod(name), self._stage.names
        (container,) = facts.given(self._stage, pod)
        spec = pod["spec"]["containers"][0]
        scores = self._stage.extender.scores.get(name, {})
        ranked = ", ".join(f"{node} {score // 10}" for node, score in sorted(scores.items(), key=lambda s: -s[1]))
        share, gpu = container.grant.gpus[0], container.gpus[0]
        added = [env["name"] for env in spec["env"] if "valueFrom" in env]
        lines = [
            ("user", f"resources: {{limits: {{{names.gpu_mem}: {spec['resources']['limits'][names.gpu_mem]}}}}}"),
            ("admission", f"schedulerName: {pod['spec']['schedulerName']}; {names.managed}: 0;"),
            ("", f"{len(added)} variables that read the pod's annotations"),
            ("scheduler", f"filter, then scores of 0..10: {ranked}"),
            ("bind", f"one write: node {pod['spec']['nodeName']}, and the grant as annotations:"),
            (
                "",
                f"GPU {gpu.index}, a {gpu.model}; {share.bytes // MIB} MiB; {container.grant.mode}",
            ),
            ("kubelet", f"ids {' '.join(container.ids)}"),
            ("container", ""),
        ]
        for label, text in lines:
            self._screen.line(f"  {self._screen.dim(f'{label:<10}')} {text}".rstrip())
        for variable in (*INJECTED, "COTENANT_ISOLATION"):
            self._screen.line(f"    {variable}={container.environment.get(variable)}")

    def _verdict(self, *, good: bool, text: str) -> None:
        mark = self._screen.good("✓") if good else self._screen.bad("✗")
        self._screen.line(f"  {mark} {text}")

    def _problem(self, sentence: str) -> None:
        self.problems.append(sentence)


def _told(pod: Json) -> str:
    status = pod.get("status", {})
    return status.get("message") or msgspec.json.encode(status.get("conditions") or []).decode()
