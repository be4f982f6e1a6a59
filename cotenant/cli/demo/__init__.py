"""`cotenant demo`: the real extender and device plugins share made-up GPUs, with stand-ins for the cluster."""

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from cotenant.cli.demo import facts, scene
from cotenant.cli.demo.children import DemoError
from cotenant.cli.demo.screen import Screen
from cotenant.cli.demo.stage import Stage
from cotenant.cli.demo.story import Story
from cotenant.cli.demo.strips import overview

_INTERRUPTED = 130


def run(*, serve: bool, plain: bool) -> int:
    """Run the demo on stdout, and stay up afterwards if *serve*; return the exit status."""
    screen = Screen(sys.stdout, plain=plain)
    began = time.monotonic()
    nodes = scene.nodes()
    problems: list[str] | None = None
    try:
        with _signals(), Stage(nodes) as stage:
            try:
                screen.line(screen.bold("Cotenant shares GPUs between Kubernetes pods by memory."))
                screen.line(screen.dim("  Its programs are real; GPUs, kubelets, scheduler, API server are stand-ins."))
                stage.start(lambda name, said: screen.line(f"  {screen.good('✓')} {name:<22}  {screen.dim(said)}"))
                screen.heading("The GPUs")
                for line in overview(facts.pictures(stage), screen.brush):
                    screen.line(line)
                story = Story(stage, screen)
                story.submit(scene.steps())
                story.free()
                story.sum_up(began)
                problems = story.problems
                if serve:
                    _serve(stage, screen)
            finally:
                _ignore_signals()  # what is left is to take everything apart, undisturbed
    except KeyboardInterrupt:
        return _INTERRUPTED if problems is None else int(bool(problems))
    except DemoError as error:
        screen.line(screen.bad(f"The demo cannot go on: {error}"))
        return 1
    return int(bool(problems))


def _serve(stage: Stage, screen: Screen) -> None:
    screen.heading("Still up, until Ctrl-C")
    for label, text in (
        ("kubeconfig", str(stage.kubeconfig)),
        ("asked by", "kubectl, kubectl gpumem, cotenant explain; with --kubeconfig"),
        ("API server", f"{stage.api.url}/api/v1/pods"),
        ("extender", f"http://{stage.serve}/ (a page) /v1/nodes /v1/pods /metrics"),
        ("its verbs", f"http://{stage.verbs}/filter /prioritize /bind"),
        ("logs", str(stage.logs)),
    ):
        screen.line(f"  {screen.dim(f'{label:<10}')} {text}")
    while not (ended := stage.children.ended()):
        time.sleep(0.5)
    raise DemoError(f"{ended[0]} has ended by itself; its last words:\n{stage.children.last_words(ended[0])}")


@contextmanager
def _signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the demo as Ctrl-C does; give the handlers back afterwards."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, _interrupt) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _ignore_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
