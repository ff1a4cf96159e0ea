"""Connection to Ray, its job server, and the nodes of a cluster."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

from mergesearch.merging import InputError
from mergesearch.merging.extensions.import_path import shared_with_workers
from mergesearch.search.retry import first_line
from mergesearch.search.spec.sections import WorkersSection
from mergesearch.search.workers.backends.placement import Node, place, report
from mergesearch.search.workers.messages import Notice

T = TypeVar("T")

#: No weights travel through Ray's object store; tasks and outcomes are a few kB.
OBJECT_STORE_BYTES = 200_000_000
#: The product's own package, which travels to nodes that do not have it.
PACKAGE = "mergesearch"
#: Attempts to connect, and seconds between two. Ray waits for a node that starts, but gives up at
#: the first request that a busy head does not answer in time.
ATTEMPTS = 3
PAUSE_SECONDS = 2.0
#: Set by Ray in the processes of a submitted job, whose code travelled with it.
JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"


def import_ray() -> Any:
    """Import Ray.

    Raises:
        InputError: If it is not installed.
    """
    try:
        import ray
    except ImportError:
        raise InputError(
            "workers.backend: ray is not installed; `pip install ray` or set it to inline"
        ) from None
    return ray


def check_objects(objects: Mapping[str, Any]) -> None:
    """Refuse functions and classes that cannot be sent to workers.

    Args:
        objects: Name -> what a program gave.

    Raises:
        InputError: If one cannot be serialised, or Ray is not installed.
    """
    if not objects:
        return
    ray = import_ray()
    for name, value in objects.items():
        try:
            ray.cloudpickle.dumps(value)
        except Exception as error:  # whatever an object raises
            raise InputError(
                f"{name}: expected an object that can be sent to workers, received: "
                f"{first_line(error)}; open files and connections inside it, or set "
                "workers.backend: inline"
            ) from None


def connect(section: WorkersSection) -> Any:
    """Connect to the cluster at ``section.address``, or start a Ray on this machine.

    Raises:
        InputError: If it does not answer, several times in a row.
    """
    # Settings that Ray reads from the environment at import or start, not from arguments.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    ray = import_ray()
    _check_listening(section.address)
    options: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": "ERROR",
        "configure_logging": True,
    }
    if section.address is None:
        needed = (
            None
            if section.count is None or section.gpus_each
            else int(-(-section.count * section.cpus // 1))
        )
        options |= {
            "num_cpus": needed,
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE_BYTES,
        }
    elif JOB_VARIABLE not in os.environ:
        options["runtime_env"] = {"py_modules": [str(package_folder())]}
    address = section.address or "local"
    error = _start_error(ray, address, options)
    for _ in range(ATTEMPTS - 1):
        if error is None or section.address is None or not _may_pass(error):
            break
        time.sleep(PAUSE_SECONDS)
        error = _start_error(ray, address, options)
    if error is not None:
        raise _no_answer(section, error)
    return ray


def _start_error(ray: Any, address: str, options: Mapping[str, Any]) -> Exception | None:
    """Start Ray in this process; why that failed, or None if it did not."""
    connected = ray.is_initialized()
    try:
        with _own_signals():
            ray.init(address=address, job_config=_job_config(), **options)
    except (ConnectionError, RuntimeError, OSError, ValueError, ray.exceptions.RayError) as error:
        if not connected:
            ray.shutdown()  # what a failed start leaves
        return cast(Exception, error)
    return None


def _job_config() -> Any:
    """Settings of this driver's job, without folders from which the driver itself does not import.

    Ray would put the driver's current folder first on the import path of every worker.
    """
    from ray.job_config import JobConfig

    class OwnPath(JobConfig):  # type: ignore[misc]
        """Leaves such folders out when the settings are sent."""

        _py_driver_sys_path: list[str]

        def _get_proto_job_config(self) -> Any:
            self._py_driver_sys_path = shared_with_workers(self._py_driver_sys_path)
            return super()._get_proto_job_config()

    return OwnPath()


def _no_answer(section: WorkersSection, error: Exception) -> InputError:
    where = section.address or "a local Ray"
    return InputError(f"workers.address: expected {where} to answer, received: {_reason(error)}")


def _may_pass(error: Exception) -> bool:
    """Whether another attempt may succeed: a head that is busy, not a token or version refused."""
    if isinstance(error, ValueError) or _is_refusal(error):
        return False
    return "version mismatch" not in str(error).lower()


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Keep our handler of SIGTERM over ``ray.init``, which sets its own.

    Ray's would end the driver at once, ours lets trials finish.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _check_listening(address: str | None) -> None:
    """Refuse an address where nobody listens; Ray itself would go on trying for minutes."""
    host, colon, port = (address or "").rpartition(":")
    if not colon or "/" in host or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise InputError(
            f"workers.address: expected {address} to answer, received: {error.strerror or error}; "
            "see `ray status` there"
        ) from None


def package_folder() -> Path:
    """The folder where the product's package is installed."""
    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def nodes_of(ray: Any) -> list[Node]:
    """Nodes that are alive, in the order of their names."""
    nodes = []
    for node in ray.nodes():
        if not node["Alive"]:
            continue
        resources = node["Resources"]
        node_id = str(node["NodeID"])
        name = f"{node['NodeManagerAddress']} ({node_id[:8]})"
        nodes.append(Node(name, resources.get("CPU", 0), resources.get("GPU", 0), node_id))
    return sorted(nodes, key=lambda node: node.name)


def announce_placement(ray: Any, section: WorkersSection, notify: Callable[[Notice], None]) -> None:
    """Say where workers will be.

    Raises:
        InputError: If they do not fit on the cluster.
    """
    nodes = nodes_of(ray)
    placements = place(nodes, section, section.count)
    placed = sum(placement.workers for placement in placements)
    wanted = section.count or 1
    if placed < wanted:
        cpus = sum(node.cpus for node in nodes)
        gpus = sum(node.gpus for node in nodes)
        lacking, have = ("GPU", gpus) if section.gpus_each * wanted > gpus else ("CPU", cpus)
        each = section.gpus_each if lacking == "GPU" else section.cpus
        raise InputError(
            f"workers: expected {each * wanted:g} {lacking}s for {wanted} workers, received "
            f"{have:g} on {len(nodes)} nodes, where {placed} fit; lower workers.count or "
            f"workers.{lacking.lower()}s"
        )
    for line in report(placements, section):
        notify(Notice("workers", line))


def job_client(address: str) -> Any:
    """A client of the cluster's job server.

    Raises:
        InputError: If Ray's job client is not installed, or the server does not answer.
    """
    ray = import_ray()
    try:
        from ray.job_submission import JobSubmissionClient

        return JobSubmissionClient(address)
    except ImportError:
        raise InputError(
            "jobs: expected ray with its job server; `pip install 'mergesearch[cluster]'`"
        ) from None
    except (RuntimeError, OSError, ray.exceptions.RayError) as error:
        raise InputError(
            f"--address: expected the job server of a cluster at {address}, received: "
            f"{_reason(error)}; it runs beside Ray's dashboard, on port 8265 of the head"
        ) from None


def ask_server(request: Callable[[], T]) -> T:
    """The answer of a job server to a request.

    Raises:
        InputError: If it refuses, or does not answer.
    """
    try:
        return request()
    except (RuntimeError, OSError, import_ray().exceptions.RayError) as error:
        raise InputError(
            f"--address: expected the job server to do as asked, received: {_reason(error)}"
        ) from None


def _reason(error: Exception) -> str:
    """The first line of an error, or how to give the cluster's token where it is missing."""
    if _is_refusal(error):
        return (
            "no or a wrong token; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to the "
            "cluster's token file"
        )
    return first_line(error)


def _is_refusal(error: BaseException | None) -> bool:
    """Whether the cluster's token is missing or wrong, as an error or one behind it says."""
    if error is None:
        return False
    text = str(error)
    named = "auth" in type(error).__name__.lower() or "AuthToken" in text
    told = re.search("authentication|unauthenticated", text, re.I) is not None
    return named or told or _is_refusal(error.__cause__)
