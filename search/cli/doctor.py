"""Checks whether machine, storage and cluster are fit for a study, before it starts."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mergesearch.merging import MergesearchError
from mergesearch.merging.tensors.accelerator import accelerator, device_module
from mergesearch.merging.tensors.parallel import usable_cores
from mergesearch.search.grammar import counted
from mergesearch.search.plan.card_check import check_cards, plan_for_this_machine
from mergesearch.search.plan.card_report import plan_lines
from mergesearch.search.plan.loading import load_study
from mergesearch.search.plan.plan import Plan
from mergesearch.search.plan.planning import plan_study
from mergesearch.search.record.run_folder import FINGERPRINTED, environment
from mergesearch.search.record.storage import open_engine
from mergesearch.search.redact import redact
from mergesearch.search.retry import reason
from mergesearch.search.spec.sections import StudySpec, WorkersSection
from mergesearch.search.workers.node_cache import node_cache_folder

CheckState = Literal["ok", "warn", "fail"]
#: Bytes that a run's folder should have left for its journal and report.
ROOM_FOR_JOURNAL = 500_000_000


@dataclass(frozen=True)
class Check:
    """The result of one check.

    Attributes:
        name: What was checked.
        state: ``ok``; ``warn``: a study may run into trouble; ``fail``: it would not run.
        text: The facts and, where something is wrong, what to do.
    """

    name: str
    state: CheckState
    text: str

    def line(self) -> str:
        """The check as a line of text."""
        return f"{self.state:<5} {self.name:<9} {self.text}"


def examine(
    study: Path | None = None,
    overrides: Sequence[str] = (),
    storage: str | None = None,
    address: str | None = None,
) -> list[Check]:
    """Check everything; a problem is a failed check, not an exception.

    Args:
        study: A study file that the machine is checked for.
        overrides: ``KEY=VALUE`` pairs for it.
        storage: A database's URL; default the study's.
        address: A Ray cluster's address; default the study's.
    """
    checks = [_versions()]
    spec = None
    plan = None
    planned = []
    if study is not None:
        try:
            spec = load_study(study, overrides)
            plan = plan_study(spec)
            planned.append(
                Check(
                    "study",
                    "ok",
                    f"{spec.name}: {counted(len(plan.space.names), 'dimension')}, "
                    f"{plan.strategy.name}",
                )
            )
        except MergesearchError as error:
            planned.append(Check("study", "fail", str(error)))
    section = WorkersSection() if spec is None else spec.workers
    if address is not None:
        section = section.model_copy(update={"address": address})
    checks += [*_devices(section), *planned, *_cards(plan, section), *_disks(plan)]
    checks += _memory(plan)
    where = storage or (None if spec is None else spec.storage)
    if where is not None:
        checks.append(_guarded("storage", lambda: _storage(where, spec)))
    if section.address is not None:
        checks.append(_guarded("cluster", lambda: _cluster(section)))
    return checks


def _guarded(name: str, check: Callable[[], Check]) -> Check:
    try:
        return check()
    except Exception as error:  # a diagnosis must not end in a traceback
        return Check(name, "fail", redact(reason(error)))


def _versions() -> Check:
    packages = environment()["packages"]
    missing = [name for name in FINGERPRINTED if name not in packages and name != "mergesearch"]
    listed = ", ".join(f"{name} {version}" for name, version in packages.items())
    text = f"Python {sys.version.split()[0]}, {listed}"
    if missing:
        return Check(
            "versions", "fail", f"missing: {', '.join(missing)}; install mergesearch again. {text}"
        )
    return Check("versions", "ok", text)


def _devices(section: WorkersSection) -> Iterator[Check]:
    import torch

    yield Check(
        "cpus",
        "ok",
        f"{usable_cores()} usable, OMP_NUM_THREADS {os.environ.get('OMP_NUM_THREADS', 'not set')}",
    )
    device = accelerator()
    if device is None:
        yield _no_card(section, torch.__version__)
        return
    cards = device_module(device)
    for index in range(cards.device_count()):
        free, total = cards.mem_get_info(index)
        yield Check(
            "gpus", "ok", f"{cards.get_device_name(index)}, {_gb(free)} of {_gb(total)} free"
        )


def _no_card(section: WorkersSection, torch_version: str) -> Check:
    """A machine without a card, which is wrong only where workers of this machine need one."""
    if not section.gpus_each or section.address is not None:
        return Check("gpus", "ok", f"none (torch {torch_version})")
    asked = f"gpus: {section.gpus:g}" if section.per_gpu is None else f"per_gpu: {section.per_gpu}"
    return Check(
        "gpus",
        "fail",
        f"no card: expected one that torch can use for workers.{asked}, found none with torch "
        f"{torch_version}; install a torch that is built for it, or set workers.gpus: 0",
    )


def _cards(plan: Plan | None, section: WorkersSection) -> Iterator[Check]:
    """Whether the study fits on the cards of this machine."""
    if plan is None or section.address is not None:
        return
    try:
        warnings = check_cards(plan)
        planned = plan_for_this_machine(plan)
    except MergesearchError as error:
        yield Check("cards", "fail", str(error))
        return
    if planned is not None and not warnings:
        yield Check("cards", "ok", "; ".join(_joined(line) for line in plan_lines(planned)))
    for warning in warnings:
        yield Check("cards", "warn", warning)


def _joined(line: str) -> str:
    """A line of a table as part of a sentence."""
    return " ".join(line.split())


def _disks(plan: Plan | None) -> Iterator[Check]:
    """Free space of the runs' folder, the nodes' cache and Ray's shared memory."""
    from mergesearch.search.cli.check import memory

    shared = 0 if plan is None else memory(plan)["shared"]
    cache = Path(tempfile.gettempdir())
    for name, path, need in (
        ("runs", Path.cwd(), ROOM_FOR_JOURNAL + shared),
        ("cache", cache, shared),
        ("shm", Path("/dev/shm"), 200_000_000),
    ):
        if not path.is_dir():
            continue
        free = shutil.disk_usage(path).free
        writable = os.access(path, os.W_OK)
        state: CheckState = (
            "ok" if free >= need and writable else "fail" if name == "runs" else "warn"
        )
        problem = "" if writable else "; cannot be written"
        problem += f"; {_gb(need)} are needed" if free < need else ""
        yield Check(name, state, f"{path}: {_gb(free)} free{problem}{_cached(path)}")


def _cached(path: Path) -> str:
    """The space that prepared weights of earlier studies take."""
    own = node_cache_folder()
    folders = [path / "runs" / ".arenas", *([own] if own.is_relative_to(path) else [])]
    size = sum(
        file.stat().st_size for folder in folders for file in folder.rglob("*") if file.is_file()
    )
    return f", of which {_gb(size)} of prepared weights can be deleted" if size else ""


def _memory(plan: Plan | None) -> Iterator[Check]:
    import psutil

    from mergesearch.search.cli.check import memory

    available = psutil.virtual_memory().available
    if plan is None:
        yield Check("memory", "ok", f"{_gb(available)} available")
        return
    need = memory(plan)
    section = plan.spec.workers
    workers = section.count or 1
    total = need["shared"] + workers * need["worker"] + need["preparing"]
    text = (
        f"{_gb(total)} for {counted(workers, 'worker')} here ({_gb(need['shared'])} of it "
        "shared), "
        f"{_gb(available)} available"
    )
    yield Check("memory", "ok" if total < available or section.address else "fail", text)


def _storage(url: str, spec: StudySpec | None) -> Check:
    """Write and drop a table, which needs all rights, and time a commit."""
    import sqlalchemy as sa

    from mergesearch.search.record.lease import holder_of

    expanded = os.path.expandvars(url)
    engine = open_engine(expanded)
    probe = sa.Table("mergesearch_doctor", sa.MetaData(), sa.Column("value", sa.Integer))
    with engine.begin() as connection:
        probe.create(connection, checkfirst=True)
    times = []
    for value in range(5):
        began = time.perf_counter()
        with engine.begin() as connection:
            connection.execute(probe.insert().values(value=value))
        times.append(time.perf_counter() - began)
    with engine.begin() as connection:
        probe.drop(connection)
    holder = None if spec is None else holder_of(engine, spec.name)
    engine.dispose()
    held = f", study {spec.name!r} is driven by {holder}" if spec is not None and holder else ""
    return Check(
        "storage", "ok", f"{redact(url)}: a commit takes {1000 * sorted(times)[2]:.1f} ms{held}"
    )


def _cluster(section: WorkersSection) -> Check:
    from mergesearch.search.workers.backends.cluster import connect, nodes_of
    from mergesearch.search.workers.backends.placement import place, report

    ray: Any = connect(section)
    try:
        nodes = nodes_of(ray)
        placements = place(nodes, section, section.count)
    finally:
        ray.shutdown()
    placed = sum(p.workers for p in placements)
    wanted = section.count or 1
    text = "; ".join(line.strip() for line in report(placements, section))
    return Check("cluster", "ok" if placed >= wanted else "fail", text)


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
