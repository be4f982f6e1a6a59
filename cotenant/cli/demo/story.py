"""The course of the demo: submit pods, show what becomes of each, compare everything, free one, sum up."""

import re
import time
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from cotenant.cli.demo import facts
from cotenant.cli.demo.children import DemoError
from cotenant.cli.demo.scene import Step
from cotenant.cli.demo.screen import TIE, Screen
from cotenant.cli.demo.stage import Stage, submit
from cotenant.cli.demo.strips import picture
from cotenant.cluster import ApiError
from cotenant.contract.environment import INJECTED, MPS_MEMORY, VISIBLE_DEVICES
from cotenant.contract.grant import ContainerGrant, Role
from cotenant.contract.inventory import Family, Mode
from cotenant.contract.units import GIB, MIB, counted, format_bytes

Json = dict[str, Any]

_PATIENCE_SECONDS = 30.0
# The pod that is deleted at the end, and the one that has waited for its memory.
LEAVES, FOLLOWS = "etl", "rerank"
_NAME_WIDTH = 18  # as in _ROW
_ROW = "{tag} {name:<18} {asks:>7}  {node:<10} {gpu:>3}  {uuid:<13}  {limit:<9} {ids:>6}  {mark}"


class Story:
    """Tell one run of the demo on *screen*; *problems* holds what disagreed, in sentences."""

    def __init__(self, stage: Stage, screen: Screen) -> None:
        self._stage = stage
        self._screen = screen
        self.problems: list[str] = []
        self._disagreements: list[str] = []
        self._submitted = 0
        self._containers = 0
        # every pod that was ever placed, and those of now that wait
        self._placed: set[str] = set()
        self._waiting: set[str] = set()
        self._refused: set[str] = set()

    def submit(self, steps: Sequence[Step]) -> None:
        """Submit everybody's pods, and show what becomes of each as it does: the first one in detail."""
        screen = self._screen
        screen.heading("Pods come, and say only how much GPU memory they want")
        explained = False
        for step in steps:
            screen.line()
            screen.wrapped(step.says, indent=2, code="3")
            names = [name for pod in step.pods if (name := self._submit(pod, step))]
            for name in self._settle(names, step):
                if step.outcome == "waits":
                    self._waiting.add(name)
                    screen.line(f"{screen.waiting('?')} {name} waits:")
                    # no line shall end between a count and what it counts
                    why = re.sub(r"(?<= \d) ", TIE, facts.why_waiting(self._pod(name)))
                    screen.wrapped(why, indent=4)
                    continue
                self._placed.add(name)
                if not explained:
                    explained = True
                    self._explain(name)
                    self._header()
                self._rows(name)
        screen.heading("Who holds what")
        self._strips()

    def free(self) -> None:
        """Delete a pod, and show the one that waited for its memory being placed."""
        self._screen.heading(f"Pod {LEAVES} is deleted, and {FOLLOWS} gets its turn")
        self._stage.api.delete_pod(LEAVES)
        if not self._stage.api.wait_until(lambda: self._runs(FOLLOWS), _PATIENCE_SECONDS):
            self.problems.append(f"pod {FOLLOWS} still waits, although {LEAVES} has left")
            return
        self._waiting.discard(FOLLOWS)
        self._placed.add(FOLLOWS)
        self._rows(FOLLOWS)
        self._screen.line()
        self._strips(only=self._pod(FOLLOWS)["spec"]["nodeName"])

    def sum_up(self, began: float) -> None:
        """Compare everything once more, and say how it went; *began* is when, in monotonic seconds."""
        stage, screen = self._stage, self._screen
        for pod in stage.api.pods():
            if pod["metadata"]["name"] in self._placed:
                self._compare(pod)
        outcomes_are_wrong = bool(self.problems)
        wrong_writes = facts.wrong_writes(stage, self._placed)
        gpus = [gpu for node in facts.pictures(stage) for gpu in node.gpus]
        over = [gpu for gpu in gpus if gpu.used_bytes > gpu.usable_bytes]
        used, usable = sum(gpu.used_bytes for gpu in gpus), sum(gpu.usable_bytes for gpu in gpus)
        self.problems += self._disagreements
        self.problems += [f"writes to {wrong}" for wrong in wrong_writes]
        self.problems += [f"a GPU holds {format_bytes(g.used_bytes)} of {format_bytes(g.usable_bytes)}" for g in over]
        self.problems += [f"{name} has ended by itself" for name in stage.children.ended()]
        placed, waiting, refused = len(self._placed), len(self._waiting), len(self._refused)

        screen.heading("In the end")
        self._verdict(
            not outcomes_are_wrong,
            f"{self._submitted} pods: {placed} placed, {waiting} waiting, {refused} refused",
        )
        among = f"{self._containers} containers: annotation, environment and device ids"
        self._verdict(
            not self._disagreements,
            f"{among} disagree, {len(self._disagreements)} x" if self._disagreements else f"{among} agree in each",
        )
        self._verdict(
            not over,
            f"{used // GIB} of {usable // GIB} GiB in use on {len(gpus)} GPUs, and on none more than it has",
        )
        self._verdict(
            not wrong_writes,
            f"{placed} API writes for {placed} placed pods: one each, node and grant together",
        )
        for problem in self.problems:
            screen.wrapped(f"✗ {problem}", indent=2, code="1;31")
        screen.line(screen.dim(f"  in {time.monotonic() - began:.1f} s"))

    # One pod

    def _submit(self, pod: Json, step: Step) -> str | None:
        """Create a pod and give its name; None when it was refused."""
        self._submitted += 1
        try:
            name: str = submit(self._stage, pod)["metadata"]["name"]
        except ApiError as error:
            name = pod["metadata"].get("name", "a pod")
            self._refused.add(name)
            self._screen.line(f"{self._screen.bad('✗')} {name} is refused:")
            self._screen.wrapped(error.message, indent=4)
            if step.outcome != "refused":
                self.problems.append(f"pod {name} was refused")
            return None
        if step.outcome == "refused":
            self.problems.append(f"pod {name} was let in, but should have been refused")
        return name

    def _settle(self, names: Sequence[str], step: Step) -> Iterator[str]:
        """Give each name once it is decided what became of the pod, if that is what should."""
        done = self._waits if step.outcome == "waits" else self._runs
        ends = time.monotonic() + _PATIENCE_SECONDS
        left = list(names)
        while left:
            settled = [name for name in left if done(name)]
            yield from settled
            left = [name for name in left if name not in settled]
            if left and not settled and not self._any_change(left, ends, step):
                for name in left:
                    pod = self._stage.api.pod(name) or {}
                    self.problems.append(f"pod {name} is {facts.phase(pod) or 'gone'}: {_told(pod)}")
                return

    def _any_change(self, names: Sequence[str], ends: float, step: Step) -> bool:
        done = self._waits if step.outcome == "waits" else self._runs
        return self._stage.api.wait_until(lambda: any(done(name) for name in names), ends - time.monotonic())

    def _runs(self, name: str) -> bool:
        return facts.phase(self._stage.api.pod(name) or {}) == "Running"

    def _waits(self, name: str) -> bool:
        return bool(facts.why_waiting(self._stage.api.pod(name) or {}))

    def _pod(self, name: str) -> Json:
        pod = self._stage.api.pod(name)
        if pod is None:
            raise DemoError(f"pod {name} is gone")
        return pod

    def _compare(self, pod: Json) -> list[facts.Given]:
        """Compare what a pod's containers were given, and note what disagrees."""
        compared = facts.given(self._stage, pod)
        sentences = [f"pod {pod['metadata']['name']}: {d}" for given in compared for d in given.disagreements]
        self._disagreements += [sentence for sentence in sentences if sentence not in self._disagreements]
        return compared

    # What is shown

    def _strips(self, only: str = "") -> None:
        nodes = [node for node in facts.pictures(self._stage) if only in {"", node.name}]
        for line in picture(nodes, self._screen.width, self._screen.brush):
            self._screen.line(line)
        if not self._screen.colour:
            self._screen.line()
            self._screen.wrapped(self._screen.legend(), indent=2)

    def _header(self) -> None:
        heads = {"name": "POD/CONTAINER", "asks": "ASKS", "node": "NODE", "gpu": "GPU", "uuid": "VISIBLE GPU"}
        row = _ROW.format(tag=" ", **heads, limit="MPS LIMIT", ids="IDS", mark="")
        self._screen.line()
        self._screen.line(self._screen.dim(row.rstrip()))

    def _rows(self, name: str) -> None:
        """Show a line for each container and each of its GPUs."""
        screen, pod = self._screen, self._pod(name)
        node = pod["spec"]["nodeName"]
        inventory = self._stage.inventory(node)
        compared = self._compare(pod)
        if inventory is None or not compared:
            self.problems.append(f"pod {name} runs without a readable grant")
            return
        for container in compared:
            self._containers += 1
            # set for every container, but read under MPS alone
            held = container.environment.get(MPS_MEMORY, "") if container.grant.mode is Mode.MPS else ""
            limits = held.split(",")
            visible = container.environment.get(VISIBLE_DEVICES, "").split(",")
            role = " init" if container.grant.role is Role.INIT else ""
            for number, gpu in enumerate(container.gpus):
                row = _ROW.format(
                    tag="{}",
                    name=f"{name}/{container.container}{role}"[:_NAME_WIDTH],
                    asks=container.grant.mig.profile
                    if container.grant.mig is not None
                    else format_bytes(container.grant.units * inventory.unit_bytes),
                    node=node,
                    gpu=gpu.index,
                    uuid=_seen(container.grant, visible[number]) if number < len(visible) else "",
                    limit=limits[number] if number < len(limits) else "",
                    ids=counted(len(container.ids) // len(container.gpus), "id"),
                    mark=screen.bad("✗") if container.disagreements else screen.good("✓"),
                )
                if number:  # the container's next GPU: what is the same for both stands only once
                    row = "{}" + " " * (row.index(node) - 2) + row[row.index(node) :].replace(node, " " * len(node))
                screen.line(row.format(" " if number else screen.tag(name)))

    def _explain(self, name: str) -> None:
        """Follow one pod from what its user wrote to what its container sees."""
        screen, names, pod = self._screen, self._stage.names, self._pod(name)
        container = facts.given(self._stage, pod)[0]
        spec = pod["spec"]["containers"][0]
        scores = sorted(self._stage.extender.scores.get(name, {}).items(), key=lambda score: -score[1])
        share, gpu = container.grant.gpus[0], container.gpus[0]
        read = sum("valueFrom" in variable for variable in spec["env"])
        visible = f"{names.visible_devices(container.container)}: {share.uuid[:21]}…"
        for label, text in (
            ("you write", f"limits: {{{names.gpu_mem}: {spec['resources']['limits'][names.gpu_mem]}}}"),
            ("admission", f"adds schedulerName, {names.managed}: 0, and {read} variables"),
            ("", "whose values are read from annotations that do not exist yet"),
            ("scheduler", f"scores: {', '.join(f'{node} {score}' for node, score in scores)}"),
            ("bind", f"one API write: the node, and the grant of GPU {gpu.index} ({gpu.model}):"),
            ("", visible),
            ("kubelet", f"prefers the ids of that GPU: {' '.join(container.ids)}"),
            ("container", f"has {share.bytes // MIB} MiB, by {container.grant.mode}:"),
            *(("", f"{key}={container.environment.get(key)}") for key in (*INJECTED, "COTENANT_ENFORCED_BY")),
        ):
            screen.line(f"  {screen.label(f'{label:<10}')} {text}")

    def _verdict(self, good: bool, text: str) -> None:  # noqa: FBT001 - reads as a sentence
        mark = self._screen.good("✓") if good else self._screen.bad("✗")
        self._screen.line(f"  {mark} {text}")


def _seen(grant: ContainerGrant, visible: str) -> str:
    """Say which GPU a container sees; the instance of a dynamic MIG grant is named by its CDI device alone."""
    return "MIG, by CDI" if grant.family is Family.MIG_DYNAMIC else f"{visible[:12]}…"


def _told(pod: Json) -> str:
    """Say all that a pod's status tells of why it is as it is."""
    status = pod.get("status", {})
    return status.get("message") or msgspec.json.encode(status.get("conditions") or []).decode()
