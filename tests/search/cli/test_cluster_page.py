"""Every command of the page "from laptop to cluster" runs, in its order, in one folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster import ROOT, running
from tests.postgres import free_port, serve
from tests.waiting import PATIENT

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ray")]

PAGE = (ROOT / "docs" / "from-laptop-to-cluster.md").read_text()


def blocks(language: str) -> list[str]:
    """Code blocks of the page."""
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_the_commands_of_the_page_run(tmp_path: Path) -> None:
    (study,) = blocks("yaml")
    (tmp_path / "rehearsal.yaml").write_text(study)
    commands = [line for block in blocks("sh") for line in block.splitlines()]
    assert len(commands) >= 13
    with serve() as server, running() as cluster:
        places = {
            "head:6379": cluster.address,
            "head:8265": cluster.server.removeprefix("http://"),
            "--port=6379": f"--port={cluster.port}",
            "--dashboard-port=8265": f"--dashboard-port={cluster.dashboard}",
            "@db/": f"@127.0.0.1:{server.port}/",
            "/shared/runs": str(tmp_path / "on the cluster").replace(" ", "-"),
            "--metrics 9100": f"--metrics {free_port()}",
            "ray start": f"ray start --temp-dir {cluster.folder}/ray "
            "--object-store-memory=100000000 "
            f"--dashboard-agent-listen-port={free_port()}",
        }
        script = ["set -ex"]
        for command in commands:
            for theirs, ours in places.items():
                command = command.replace(theirs, ours)
            script.append(command)
        environment = cluster.environment | {
            "HOME": str(cluster.folder),  # where ray keeps a token
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PGPASSWORD": server.password,
            "PYTHONPATH": str(ROOT),
        }
        del environment["RAY_AUTH_MODE"]
        token = environment.pop("RAY_AUTH_TOKEN_PATH")
        try:
            done = subprocess.run(
                ["bash", "-c", "\n".join(script)],
                cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=PATIENT,
            )  # fmt: skip
        finally:
            _end(cluster.folder, environment)
        assert Path(token).exists()
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "succeeded" in done.stdout
    assert server.password not in done.stdout + done.stderr
    assert (tmp_path / "runs" / "rehearsal" / "report.html").is_file()
    assert not (tmp_path / "runs" / "in-db" / "journal.log").exists()


def _end(folder: Path, environment: dict[str, str]) -> None:
    """End the processes of the head that the page started: they name its folder."""
    import psutil

    for process in psutil.process_iter():
        try:
            if any(str(folder) in word for word in process.cmdline()) or process.environ().get(
                "TMPDIR"
            ) == str(folder):
                process.kill()
        except psutil.Error:
            continue
