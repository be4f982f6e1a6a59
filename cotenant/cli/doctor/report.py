"""How the doctor's findings are told."""

import click
import msgspec

from cotenant.cli.doctor.checks import CHECKS, Finding, Severity, examine
from cotenant.cli.doctor.facts import gather
from cotenant.cluster import ClusterError, connect
from extender.inspect.tables import plain

_BROKEN_STATUS = 1


def run(*, kubeconfig: str | None, context: str | None, service: str, output: str) -> int:
    """Examine a cluster and print what is found; give 1 where something is broken, else 0."""
    try:
        with connect(kubeconfig, context=context, pool_size=1) as cluster:
            findings = examine(gather(cluster, service=service))
    except ClusterError as error:
        raise click.ClickException(str(error)) from error
    if output == "json":
        click.echo(msgspec.json.format(msgspec.json.encode(findings), indent=2).decode())
    else:
        click.echo(text(findings), nl=False)
    return _BROKEN_STATUS if any(one.severity is Severity.BROKEN for one in findings) else 0


def text(findings: list[Finding]) -> str:
    """Write findings for people, each with what to do."""
    lines = []
    for one in findings:
        lines += [f"{one.severity}: {one.check}", f"  {plain(one.what)}", f"  -> {one.do}", ""]
    broken = sum(one.severity is Severity.BROKEN for one in findings)
    what = f"{broken} broken, {len(findings) - broken} to look at" if findings else "nothing found"
    return "\n".join([*lines, f"{len(CHECKS)} checks: {what}", ""])
