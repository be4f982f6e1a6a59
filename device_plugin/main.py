"""The command `cotenant-device-plugin`."""

import socket
import sys
import threading
from pathlib import Path

import click
import msgspec

from cotenant import __version__, logs
from cotenant.cluster import NoCluster, connect
from cotenant.contract import configuration
from cotenant.contract.configuration import ConfigurationError, DevicePluginConfiguration, is_address
from cotenant.contract.inventory import GPU, Family
from cotenant.contract.units import format_bytes
from cotenant.signals import at_the_end
from device_plugin.admission.ids import TooManyIdsError
from device_plugin.families.occupants import OccupiedError
from device_plugin.nvml import NVML, NVMLUnavailableError
from device_plugin.plugin import DevicePlugin
from device_plugin.watchdog.proc import Processes

_FILE = click.Path(dir_okay=False, path_type=Path)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--config", "config_file", type=_FILE, help="Configuration file (YAML); defaults without one.")
@click.option("--kubeconfig", type=click.Path(dir_okay=False), help="How to reach the API server; in a pod not needed.")
@click.option("--node-name", envvar="NODE_NAME", help="Name of this node's Node object [default: the host's name].")
@click.option(
    "--kubelet-dir",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("/var/lib/kubelet"),
    show_default=True,
    help="The kubelet's folder; or, if it has no device-plugins in it, the device-plugins folder itself.",
)
@click.option(
    "--pod-resources",
    type=click.Path(path_type=Path),
    help="The kubelet's PodResources socket [default: pod-resources/kubelet.sock in its folder].",
)
@click.option("--serve", metavar="HOST:PORT", help="Answer metrics and health here [default: nowhere].")
@click.option(
    "--nvidia-config",
    type=click.Path(path_type=Path),
    help="NVIDIA's sharing configuration, a file or a folder of files, for GPUs that our own rules do not name.",
)
@click.option(
    "--watchdog-interval",
    type=click.FloatRange(0, 3600),
    metavar="SECONDS",
    help="Look so often who uses how much GPU memory; takes the node's PID namespace.",
)
@click.option("--nvml-library", type=_FILE, help="libnvidia-ml.so.1, where the loader does not find it.")
@click.option("--fake-gpus", type=_FILE, help="Serve made-up GPUs from this file, for trials without any.")
@click.version_option(__version__, message="%(prog)s %(version)s")
def main(
    *,
    config_file: Path | None,
    kubeconfig: str | None,
    node_name: str | None,
    kubelet_dir: Path,
    pod_resources: Path | None,
    serve: str | None,
    nvidia_config: Path | None,
    watchdog_interval: float | None,
    nvml_library: Path | None,
    fake_gpus: Path | None,
) -> None:
    """Serve the GPU memory of this node to its kubelet and publish what there is."""
    _check(nvml_library, fake_gpus, serve)
    stop = threading.Event()
    at_the_end(stop.set)
    node = node_name or socket.gethostname()
    logs.configure("cotenant-device-plugin", node=node)
    try:
        settings = configuration.load(config_file, DevicePluginConfiguration)
        if nvidia_config is not None:
            settings = msgspec.structs.replace(settings, nvidia_config=str(nvidia_config))
        if watchdog_interval is not None:
            watchdog = msgspec.structs.replace(settings.watchdog, interval=watchdog_interval)
            settings = msgspec.structs.replace(settings, watchdog=watchdog)
        if serve is not None:
            settings = msgspec.structs.replace(settings, serve=serve)
        nvml = NVML.open(library_path=nvml_library, fake=fake_gpus)
        cluster = connect(kubeconfig)
    except (ConfigurationError, NVMLUnavailableError, NoCluster) as error:
        raise click.ClickException(str(error)) from error

    def say_ready(gpus: tuple[GPU, ...]) -> None:
        units = sum(gpu.usable_bytes for gpu in gpus if gpu.family is Family.MEMORY) // settings.unit_bytes
        click.echo(
            f"cotenant-device-plugin ready: {len(gpus)} GPUs, {units} units of {format_bytes(settings.unit_bytes)} "
            f"on node {node}"
        )
        sys.stdout.flush()

    nested = kubelet_dir / "device-plugins"
    try:
        plugin = DevicePlugin(
            configuration=settings,
            cluster=cluster,
            nvml=nvml,
            node=node,
            plugin_folder=nested if nested.is_dir() else kubelet_dir,
            pod_resources=pod_resources or kubelet_dir / "pod-resources" / "kubelet.sock",
            ready=say_ready,
            config_file=config_file,
            processes=Processes(),
        )
        plugin.start()
    except (TooManyIdsError, NVMLUnavailableError, ConfigurationError, OccupiedError) as error:
        raise click.ClickException(str(error)) from error
    stop.wait()
    plugin.stop()
    nvml.close()
    cluster.close()


def _check(nvml_library: Path | None, fake_gpus: Path | None, serve: str | None) -> None:
    if nvml_library is not None and fake_gpus is not None:
        raise click.UsageError("--nvml-library and --fake-gpus exclude each other: GPUs are real or made up.")
    if serve is not None and not is_address(serve):
        raise click.BadParameter(f"{serve!r} is not HOST:PORT, such as 127.0.0.1:9482", param_hint="--serve")
