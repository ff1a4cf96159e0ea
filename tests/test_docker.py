"""The files under docker/: linters agree, promises hold, scripts run without an engine."""

from __future__ import annotations

import contextlib
import fnmatch
import http.server
import importlib.util
import itertools
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import textwrap
import threading
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import yaml

from mergesearch.merging import RunFolderError
from mergesearch.search.spec.study_file import validate
from tests.postgres import Server, free_port
from tests.search.studies import analytic, write_study
from tests.waiting import PATIENT, wait_for

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "docker"
DOCKERFILE = DOCKER / "Dockerfile"
SBATCH = DOCKER / "slurm" / "mergesearch.sbatch"
FILES = [
    path
    for path in sorted(DOCKER.rglob("*"))
    if path.is_file() and path.parent.name not in ("secrets", "__pycache__")
]
SCRIPTS = [path for path in FILES if path.suffix in (".sh", ".sbatch")]
MANIFESTS = sorted(DOCKER.glob("kuberay/*.yaml"))
BIN = Path(sys.executable).parent


def tool(name: str) -> str:
    """A linter of this environment or the machine."""
    found = shutil.which(name, path=f"{BIN}:{os.environ['PATH']}")
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def succeeds(*command: str | Path, **options: Any) -> str:
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=PATIENT, **options
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def module(path: Path) -> Any:
    """A script of docker/ as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def with_defaults(text: str) -> str:
    """``${NAME:-default}`` replaced by its default."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


def compose(*names: str) -> dict[str, Any]:
    """The services of a compose file, with others laid over it."""
    merged: dict[str, Any] = {}
    for name in names:
        merged = _over(merged, yaml.safe_load(with_defaults((DOCKER / name).read_text())))
    return merged


def _over(below: Any, above: Any) -> Any:
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    return below | {key: _over(below.get(key), value) for key, value in above.items()}


COMPOSE = compose("compose.yaml")
GPU = compose("compose.yaml", "compose.gpu.yaml")
DOCUMENTS = [document for path in MANIFESTS for document in yaml.safe_load_all(path.read_text())]
RAYJOB = next(document for document in DOCUMENTS if document["kind"] == "RayJob")
CLUSTER = RAYJOB["spec"]["rayClusterSpec"]
WORKERS = CLUSTER["workerGroupSpecs"][0]
TEMPLATES = {
    "submitter": RAYJOB["spec"]["submitterPodTemplate"],
    "head": CLUSTER["headGroupSpec"]["template"],
    "worker": WORKERS["template"],
    "postgres": next(document for document in DOCUMENTS if document["kind"] == "StatefulSet")[
        "spec"
    ]["template"],
}


# Linters


@pytest.mark.parametrize(
    "path", [path for path in FILES if path.suffix == ".yaml"], ids=lambda path: path.name
)
def test_yaml_passes_yamllint(path: Path) -> None:
    rules = (
        "{line-length: {max: 120}, document-start: disable, comments: {min-spaces-from-content: 2}}"
    )
    succeeds(tool("yamllint"), "--strict", "-d", f"{{extends: default, rules: {rules}}}", path)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_pass_bash_and_shellcheck(path: Path) -> None:
    succeeds("bash", "-n", path)
    succeeds(tool("shellcheck"), path)


def test_the_dockerfile_passes_hadolint() -> None:
    succeeds(tool("hadolint"), DOCKERFILE)


@pytest.mark.parametrize("name", ["compose.yaml", "compose.gpu.yaml"])
def test_compose_files_keep_the_schema(name: str) -> None:
    succeeds(tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", DOCKER / name)


def test_compose_itself_reads_the_files() -> None:
    docker = shutil.which("docker")
    if (
        docker is None
        or subprocess.run([docker, "compose", "version"], capture_output=True).returncode != 0
    ):
        pytest.skip("docker compose is not installed")
    succeeds(
        docker,
        "compose",
        "-f",
        DOCKER / "compose.yaml",
        "-f",
        DOCKER / "compose.gpu.yaml",
        "config",
        "--quiet",
    )


@pytest.mark.parametrize(
    "document", DOCUMENTS, ids=lambda document: f"{document['kind']}-{document['metadata']['name']}"
)
def test_manifests_keep_the_schemas_of_kubernetes(document: dict[str, Any]) -> None:
    kubernetes = pytest.importorskip("kubernetes_validate")
    if document["kind"] != "RayJob":
        kubernetes.validate(document, kubernetes.latest_version(), strict=True)


@pytest.mark.parametrize("role", ["submitter", "head", "worker"])
def test_pods_of_the_rayjob_keep_the_schema_of_pods(role: str) -> None:
    kubernetes = pytest.importorskip("kubernetes_validate")
    pod = {"apiVersion": "v1", "kind": "Pod", **TEMPLATES[role]}
    kubernetes.validate(pod, kubernetes.latest_version(), strict=True)


def test_the_rayjob_uses_fields_that_kuberay_knows() -> None:
    job = {
        *("entrypoint", "backoffLimit", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished"),
        *("submitterPodTemplate", "rayClusterSpec"),
    }
    cluster = {
        *("rayVersion", "authOptions", "enableInTreeAutoscaling", "autoscalerOptions"),
        *("headGroupSpec", "workerGroupSpecs"),
    }
    group = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}
    assert RAYJOB["apiVersion"] == "ray.io/v1"
    assert set(RAYJOB["spec"]) == job
    assert set(CLUSTER) == cluster
    assert set(CLUSTER["headGroupSpec"]) == {"rayStartParams", "template"}
    assert set(WORKERS) == group
    assert set(CLUSTER["autoscalerOptions"]) == {
        "version",
        "idleTimeoutSeconds",
        "securityContext",
        "resources",
    }
    parameters = [
        *CLUSTER["headGroupSpec"]["rayStartParams"].values(),
        *WORKERS["rayStartParams"].values(),
    ]
    assert all(isinstance(value, str) for value in parameters), "KubeRay takes strings only"


# The image


def instructions(name: str) -> list[str]:
    """Arguments of every such instruction of the Dockerfile, in order, continued lines joined."""
    text = re.sub(r"\\\n\s*", "", DOCKERFILE.read_text())
    return re.findall(rf"^{name} (.*)$", text, re.MULTILINE)


def sources_copied() -> list[str]:
    words = [
        [word for word in line.split() if not word.startswith("--")]
        for line in instructions("COPY")
    ]
    return [source for line in words for source in line[:-1]]


def admitted(path: str) -> bool:
    """Whether .dockerignore lets ``path`` into the build; the last rule that matches decides."""
    parents = [path, *(str(parent) for parent in Path(path).parents)]
    decided = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        rule = line.removeprefix("!").replace("**/", "*")
        if any(fnmatch.fnmatchcase(each, rule) for each in parents):
            decided = line.startswith("!")
    return decided


def test_the_image_is_never_root_and_says_how_it_is() -> None:
    text = DOCKERFILE.read_text()
    assert instructions("USER") == ["1000:1000"]
    after = text[text.index("\nUSER ") :]
    assert not re.search(r"^(RUN|COPY|ADD|FROM) ", after, re.MULTILINE)
    assert len(instructions("HEALTHCHECK")) == 1
    assert instructions("ENTRYPOINT") == ['["with-secrets", "mergesearch"]']


def test_base_images_are_pinned_to_a_patch_release() -> None:
    outside = [
        line.split()[0]
        for line in instructions("FROM")
        if line.split()[0] not in ("base", "torch-${DEVICE}")
    ]
    assert outside
    assert all(re.fullmatch(r"python:3\.\d+\.\d+-slim-bookworm", name) for name in outside)
    for device in (
        COMPOSE["services"]["head"]["build"]["args"],
        GPU["services"]["head"]["build"]["args"],
    ):
        assert any(line.endswith(f" AS torch-{device['DEVICE']}") for line in instructions("FROM"))


def test_every_install_keeps_the_constraints_and_leaves_no_cache() -> None:
    installs = [
        part for line in instructions("RUN") for part in line.split("&&") if "pip install" in part
    ]
    assert len(installs) == 4
    assert all("--no-cache-dir" in part for part in installs)
    assert all("--constraint constraints.txt" in part or "--no-deps ." in part for part in installs)


def test_requirements_are_those_of_the_project_and_the_cluster() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    printed = succeeds(
        sys.executable, DOCKER / "requirements.py", ROOT / "pyproject.toml", "cluster"
    ).splitlines()
    assert printed == project["dependencies"] + project["optional-dependencies"]["cluster"]
    assert {"torch>=2.6", "ray[default]>=2.50"} <= set(printed)


def test_the_build_sees_what_it_copies_and_no_secret() -> None:
    for source in sources_copied():
        assert (ROOT / source).exists(), source
        assert admitted(source), source
    hidden = [
        "docker/secrets/postgres_password",
        "zoo/digits/base",
        "runs/digits/journal.log",
        ".git/config",
        ".env",
    ]
    assert not [path for path in hidden if admitted(path)]
    assert not admitted("search/__pycache__/cli.cpython-311.pyc")


def test_what_is_copied_builds_the_whole_product(tmp_path: Path) -> None:
    context = tmp_path / "src"
    for source in [source for source in sources_copied() if not source.startswith("docker/")]:
        target = context / source
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, target, symlinks=True)  # as COPY does
        else:
            shutil.copy(ROOT / source, target)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
    ]
    succeeds(*pip, "--wheel-dir", tmp_path, context)
    built = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    packages = ("evaluators", "merging", "search", "spaces")
    files = [path for name in packages for path in (ROOT / name).rglob("*.py")]
    wanted = {f"mergesearch/{path.relative_to(ROOT)}" for path in files}
    assert wanted | {"mergesearch/__init__.py", "mergesearch/__main__.py"} <= built


# Compose


@pytest.mark.parametrize("services", [COMPOSE["services"], GPU["services"]], ids=["cpu", "gpu"])
def test_services_are_pinned_checked_restarted_and_local(services: dict[str, Any]) -> None:
    assert set(services) == {"head", "worker", "postgres", "dashboard"}
    for name, service in services.items():
        assert re.fullmatch(r"[\w./-]+:[\w.-]+", service["image"]), name
        assert not service["image"].endswith(":latest"), name
        assert service["restart"] == "unless-stopped", name
        assert service["healthcheck"]["test"][0] == "CMD", name
        assert "no-new-privileges:true" in service["security_opt"], name
        assert all(
            re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port) for port in service.get("ports", [])
        ), name
        assert all(
            each == {"condition": "service_healthy"}
            for each in service.get("depends_on", {}).values()
        ), name


def test_services_that_run_the_product_run_one_image() -> None:
    for services in (COMPOSE["services"], GPU["services"]):
        assert len({services[name]["image"] for name in ("head", "worker", "dashboard")}) == 1


def test_secrets_are_files_that_only_those_who_need_them_get() -> None:
    assert set(COMPOSE["secrets"]) == {"postgres_password", "dashboard_token", "ray_token"}
    for secret in COMPOSE["secrets"].values():
        path = DOCKER / secret["file"]
        succeeds("git", "check-ignore", "--quiet", path, cwd=ROOT)
        assert not admitted(str(path.resolve().relative_to(ROOT)))
    given = {
        name: sorted(service.get("secrets", [])) for name, service in COMPOSE["services"].items()
    }
    assert given == {
        "head": ["postgres_password", "ray_token"],
        "worker": ["ray_token"],
        "postgres": ["postgres_password"],
        "dashboard": ["dashboard_token", "postgres_password"],
    }
    assert COMPOSE["services"]["worker"]["networks"] == ["cluster"]
    assert COMPOSE["networks"]["database"] == {"internal": True}


def test_models_are_read_only_and_runs_are_kept() -> None:
    for name in ("head", "worker"):
        assert any(
            volume.endswith(":/models:ro") for volume in COMPOSE["services"][name]["volumes"]
        )
    assert "runs:/runs" in COMPOSE["services"]["head"]["volumes"]
    assert set(COMPOSE["volumes"]) == {"database", "runs"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_file_holds_a_secret_or_a_moving_tag(path: Path) -> None:
    text = path.read_text()
    assert not re.search(r"://[^/\s:@]+:[^/\s@]+@", text), "a URL with a password"
    assert not re.search(
        r"\b(PGPASSWORD|POSTGRES_PASSWORD|RAY_AUTH_TOKEN|MERGESEARCH_DASHBOARD_TOKEN)\b\s*[:=]",
        text,
    )
    assert not re.search(r"image:.*:latest|^FROM \S+:latest", text, re.MULTILINE)


def test_commands_in_the_files_are_options_of_the_command_line() -> None:
    import typer.main

    from mergesearch.search.cli.main import app

    verbs = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    dashboard = " ".join(["mergesearch", *COMPOSE["services"]["dashboard"]["command"]])
    readme = re.sub(r"\\\n\s*", "", (DOCKER / "README.md").read_text())
    texts = [dashboard, RAYJOB["spec"]["entrypoint"], SBATCH.read_text(), readme]
    used = [
        found
        for text in texts
        for found in re.findall(r"\bmergesearch (run|submit|dashboard|doctor) (.*)", text)
    ]
    assert {verb for verb, _ in used} == {"run", "submit", "dashboard", "doctor"}
    for verb, rest in used:
        known = {option for parameter in verbs[verb].params for option in parameter.opts}
        assert set(re.findall(r"(?<=\s)--[a-z-]+", f" {rest.split('#')[0]}")) <= known, (
            f"{verb} {rest}"
        )


# Kubernetes


@pytest.mark.parametrize("role", TEMPLATES)
def test_pods_keep_the_restricted_standard(role: str) -> None:
    pod = TEMPLATES[role]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in pod["containers"]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        }
        assert {"requests", "limits"} <= set(container["resources"])
        assert re.search(r":\d[\w.-]*$", container["image"])


@pytest.mark.parametrize("role", ["head", "worker", "postgres"])
def test_long_running_containers_have_probes(role: str) -> None:
    for container in TEMPLATES[role]["spec"]["containers"]:
        for probe in (container["readinessProbe"], container["livenessProbe"]):
            assert probe["exec"]["command"][0] in ("answers", "pg_isready")


def test_passwords_come_from_a_secret_that_no_file_holds() -> None:
    assert not [document for document in DOCUMENTS if document["kind"] == "Secret"]
    for role in ("head", "postgres"):
        volumes = TEMPLATES[role]["spec"]["volumes"]
        assert {"secretName": "mergesearch-postgres", "defaultMode": 0o440} in [
            each.get("secret") for each in volumes
        ]
    for role, template in TEMPLATES.items():
        for variable in (
            each
            for container in template["spec"]["containers"]
            for each in container.get("env", [])
        ):
            assert "PASSWORD" not in variable["name"] or variable["name"].endswith("_FILE"), role
    assert "password" not in str(TEMPLATES["worker"])


def test_network_policies_name_roles_that_exist() -> None:
    roles = {
        template["metadata"]["labels"]["mergesearch-role"] for template in TEMPLATES.values()
    } | {"dashboard"}
    for policy in (document for document in DOCUMENTS if document["kind"] == "NetworkPolicy"):
        text = str(policy)
        named = {
            role
            for role in ("head", "worker", "submitter", "postgres", "dashboard")
            if f"'{role}'" in text
        }
        assert named
        assert named <= roles


def test_the_job_fits_the_autoscaler_and_needs_no_shell() -> None:
    words = RAYJOB["spec"]["entrypoint"].split()
    assert not re.search(r"[&|;<>$`\"']", RAYJOB["spec"]["entrypoint"])
    assert words[:2] == ["with-secrets", "request-cpus"]
    bundles = module(DOCKER / "request_cpus.py").bundles(words[2])
    cpus = float(WORKERS["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"])
    assert bundles == [{"CPU": cpus}] * WORKERS["maxReplicas"]


def test_the_study_of_the_job_is_valid_and_mounted_where_it_is_run() -> None:
    study = next(document for document in DOCUMENTS if document["kind"] == "ConfigMap")
    spec = validate(yaml.safe_load(study["data"]["study.yaml"]), "study.yaml")
    assert spec.storage == "postgresql+psycopg://mergesearch@postgres/mergesearch"
    mounts = {
        m["name"]: m["mountPath"]
        for m in TEMPLATES["head"]["spec"]["containers"][0]["volumeMounts"]
    }
    assert f"{mounts['study']}/study.yaml" in RAYJOB["spec"]["entrypoint"]
    assert f"--run {mounts['runs']}/" in RAYJOB["spec"]["entrypoint"]


def test_the_job_names_the_ray_that_is_installed() -> None:
    pinned = re.search(r"^ray==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    assert CLUSTER["rayVersion"] == pinned[1]


# Scripts of the image


def secrets_environment(
    folder: Path, password: str | None = None, token: str | None = None
) -> dict[str, str]:
    """The environment of a container whose secrets are in ``folder``."""
    for name, value in (("password", password), ("token", token)):
        if value is not None:
            (folder / name).write_text(value)
            (folder / name).chmod(0o444)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
    return clean | {
        "POSTGRES_PASSWORD_FILE": str(folder / "password"),
        "DASHBOARD_TOKEN_FILE": str(folder / "token"),
        "PGPASSFILE": str(folder / "pgpass"),
    }


@pytest.fixture
def server(postgres: Server) -> Server:
    return postgres


@pytest.mark.xdist_group("postgres")
@pytest.mark.parametrize(
    "password", ["plain", r"co:lon\and \: more", "  blank ends  ", "ends with \\"]
)
def test_libpq_accepts_the_password_file(tmp_path: Path, server: Server, password: str) -> None:
    role = f"role{abs(hash(password))}"
    with psycopg.connect(server.address("postgres"), autocommit=True) as connection:
        connection.execute(
            psycopg.sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}").format(
                psycopg.sql.Identifier(role), password
            )
        )
    code = (
        "import psycopg; "
        f"psycopg.connect('postgresql://{role}@127.0.0.1:{server.port}/mergesearch').close()"
    )
    environment = secrets_environment(tmp_path, password + "\n")
    environment |= {"POSTGRES_USER": role, "POSTGRES_HOST": "127.0.0.1"}
    run = [DOCKER / "with-secrets.sh", sys.executable, "-c", code]
    succeeds(*run, env=environment)
    (tmp_path / "password").unlink()
    (tmp_path / "password").write_text("wrong")
    assert subprocess.run([*map(str, run)], env=environment, capture_output=True).returncode == 1


def test_the_password_is_not_offered_to_another_server(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as foreign:
        foreign.settimeout(20)
        url = f"postgresql://mergesearch@127.0.0.1:{foreign.getsockname()[1]}/x?sslmode=disable&connect_timeout=5"
        run = [
            str(DOCKER / "with-secrets.sh"),
            sys.executable,
            "-c",
            f"import psycopg; psycopg.connect({url!r})",
        ]
        environment = secrets_environment(tmp_path, "s3cret-word")
        process = subprocess.Popen(run, env=environment, stderr=subprocess.PIPE, text=True)
        connection, _ = foreign.accept()
        with connection:
            connection.recv(4096)
            connection.sendall(b"R\0\0\0\x08\0\0\0\x03")  # asks for the password in plain text
            assert connection.recv(4096) == b""
        assert process.stderr is not None
        assert "no password supplied" in process.stderr.read()
        assert process.wait(PATIENT) == 1


def test_secrets_become_private_files_and_nothing_else(tmp_path: Path) -> None:
    environment = secrets_environment(tmp_path, "s3cret-word\n", "t0ken-word\n")
    out = succeeds(
        DOCKER / "with-secrets.sh",
        "bash",
        "-c",
        "env; tr '\\0' ' ' < /proc/$$/cmdline",
        env=environment,
    )
    assert "s3cret-word" not in out
    assert "t0ken-word" not in out
    assert (tmp_path / "pgpass").read_text() == "postgres:*:*:mergesearch:s3cret-word\n"
    assert (tmp_path / "dashboard_token").read_text() == "t0ken-word\n"
    for name in ("pgpass", "dashboard_token"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600
    assert len(list(tmp_path.iterdir())) == 4  # no half-written file is left


def test_a_container_without_secrets_just_runs(tmp_path: Path) -> None:
    assert (
        succeeds(DOCKER / "with-secrets.sh", "echo", "as it is", env=secrets_environment(tmp_path))
        == "as it is\n"
    )
    assert not (tmp_path / "pgpass").exists()


def test_an_empty_secret_is_refused_in_one_line(tmp_path: Path) -> None:
    run = [str(DOCKER / "with-secrets.sh"), "echo", "ran"]
    done = subprocess.run(
        run, env=secrets_environment(tmp_path, "\n"), capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "expected a secret" in done.stderr


def test_with_secrets_leaves_signals_and_exit_codes_to_the_command(tmp_path: Path) -> None:
    run = [
        str(DOCKER / "with-secrets.sh"),
        "bash",
        "-c",
        "trap 'exit 130' TERM; echo up; while :; do sleep 0.05; done",
    ]
    process = subprocess.Popen(run, env=secrets_environment(tmp_path), stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    process.terminate()
    assert process.wait(PATIENT) == 130


class _Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response({"/fine": 200, "/": 401, "/moved": 302}.get(self.path, 503))
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def site() -> Iterator[str]:
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Answer)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}"
    running.shutdown()
    running.server_close()


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["{}/fine"], 0),
        (["{}/fine", "{}/ill"], 1),
        (["{}/moved"], 1),
        (["--status", "401", "{}/"], 0),
        (["--status", "401", "{}/fine"], 1),  # a dashboard that lets strangers in is not healthy
    ],
)
def test_health_checks_tell_answers_apart(site: str, arguments: list[str], code: int) -> None:
    command = [sys.executable, DOCKER / "answers.py", *(text.format(site) for text in arguments)]
    assert subprocess.run(command, capture_output=True).returncode == code


def test_health_checks_fail_where_nobody_listens() -> None:
    url = f"http://127.0.0.1:{free_port()}/"
    done = subprocess.run(
        [sys.executable, DOCKER / "answers.py", url], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "ConnectionRefusedError" in done.stdout


def test_health_checks_fail_where_nobody_answers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        done = subprocess.run(
            [sys.executable, DOCKER / "answers.py", url],
            capture_output=True, text=True, timeout=PATIENT,
        )  # fmt: skip
    assert done.returncode == 1


def test_requests_for_cpus_are_read_or_refused() -> None:
    bundles = module(DOCKER / "request_cpus.py").bundles
    assert bundles("2x8+1") == [{"CPU": 8.0, "GPU": 1.0}] * 2
    assert bundles("1x0+4") == [{"GPU": 4.0}]
    with pytest.raises(ValueError, match="expected COUNTxCPUS"):
        bundles("8")


# Slurm: the batch script runs for real, with stand-ins for the programs that it starts


class Job:
    """A job of the batch script on one machine; ``calls`` holds the calls of its programs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: list[subprocess.Popen[str]] = []
        self.bin = folder / "bin"
        self.bin.mkdir()
        (folder / "study.yaml").write_text("name: study\n")
        self.environment = os.environ | {
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "CALLS": str(folder / "calls"),
            "SLURM_JOB_ID": "4711",
            "SLURM_JOB_NUM_NODES": "3",
            "SLURM_CPUS_PER_TASK": "4",
            "SLURMD_NODENAME": "node1",
            "MERGESEARCH_HEAD_IP": "127.0.0.1",
            "MERGESEARCH_START_SECONDS": str(PATIENT),
            "STATE": "RUNNING",
        }
        # Options of srun end at the command.
        self.program("srun", 'note "$@"; while [[ $1 == --* ]]; do shift; done; exec "$@"')
        self.program(
            "scontrol",
            'note "$@"; [[ $1 == show ]] && echo "JobId=$4 JobState=$STATE Reason=None"; exit 0',
        )
        ray = """
            [[ $1 == health-check ]] && { [[ ! -e $CALLS.sick ]]; exit; }
            trap 'note ended; exit 0' TERM
            note "$@"
            stat -c 'token %a' "$RAY_AUTH_TOKEN_PATH" >> "$CALLS"
            [[ -e $CALLS.dead ]] && exit 1
            while :; do sleep 0.05; done
        """
        self.program("ray", ray)

    def program(self, name: str, body: str) -> None:
        """A stand-in on the job's PATH."""
        note = f'note() {{ echo "{name} $*" >> "$CALLS"; }}'
        path = self.bin / name
        path.write_text(f"#!/usr/bin/env bash\n{note}\n{textwrap.dedent(body)}\n")
        path.chmod(0o755)

    def driver(self, on_term: int | None, at_once: int | None = None) -> None:
        """A driver that ends with ``at_once``, or waits for SIGTERM and ends with ``on_term``."""
        wait = (
            f"trap 'note TERM; sleep 0.3; exit {on_term}' TERM; note up; while :; do sleep "
            "0.05; done"
        )
        self.program("mergesearch", f'note "$@"; {wait if at_once is None else f"exit {at_once}"}')

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Slurm's own way: the script is the leader, and signals reach it alone."""
        given = arguments or (str(self.folder / "study.yaml"), str(self.folder / "run"))
        process = subprocess.Popen(
            ["bash", str(SBATCH), *given],
            env=self.environment, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        self.processes.append(process)
        return process

    def end(self) -> None:
        """End what a failed test has left running; every job leads a group of its own."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    @property
    def calls(self) -> list[str]:
        path = self.folder / "calls"
        return path.read_text().splitlines() if path.exists() else []

    def wait_for(self, call: str, times: int = 1) -> None:
        """Wait until a program has noted ``call`` so often."""
        wait_for(lambda: self.calls.count(call) >= times, pause=0.02)

    @property
    def requeued(self) -> bool:
        return "scontrol requeue 4711" in self.calls


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    made = Job(tmp_path)
    yield made
    tokens = list(tmp_path.glob("*token*"))
    programs = running_below(made.bin)
    made.end()
    # Whatever happened in the job, neither a token nor a program of it is left.
    assert not tokens
    assert not programs


def running_below(folder: Path) -> list[str]:
    """Command lines of processes that run a program of ``folder``."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        lines += [line] if str(folder) in line else []
    return lines


@pytest.mark.parametrize(
    ("code", "requeued"), [(0, False), (1, False), (2, False), (137, False), (130, True)]
)
def test_sigterm_reaches_the_driver_and_130_alone_requeues(
    job: Job, code: int, requeued: bool
) -> None:
    job.driver(on_term=code)
    process = job.start()
    job.wait_for("mergesearch up")
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENT) == code
    assert job.calls.count("mergesearch TERM") == 1
    assert job.requeued is requeued


@pytest.mark.parametrize("code", [0, 1, 2])
def test_a_study_that_ends_is_not_requeued(job: Job, code: int) -> None:
    job.driver(on_term=None, at_once=code)
    assert job.start().wait(PATIENT) == code
    assert not job.requeued


def test_the_cluster_is_ended_before_the_job_is_requeued(job: Job) -> None:
    job.driver(on_term=130)
    process = job.start()
    job.wait_for("mergesearch up")
    job.wait_for("token 600", times=2)
    process.send_signal(signal.SIGTERM)
    process.wait(PATIENT)
    ends = [number for number, call in enumerate(job.calls) if call == "ray ended"]
    assert len(ends) == 2
    assert max(ends) < job.calls.index("scontrol requeue 4711")
    assert job.calls[-1] == "scontrol requeue 4711"


def test_a_second_sigterm_is_passed_on_and_the_code_is_still_the_drivers(job: Job) -> None:
    body = """
        note up; count=0
        trap 'count=$((count + 1)); note "TERM $count"; ((count < 2)) || exit 130' TERM
        while :; do sleep 0.05; done
    """
    job.program("mergesearch", body)
    process = job.start()
    for count in (1, 2):
        job.wait_for("mergesearch up" if count == 1 else "mergesearch TERM 1")
        process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENT) == 130
    assert job.requeued


@pytest.mark.parametrize("state", ["CANCELLED", "COMPLETING"])
def test_a_cancelled_job_is_not_requeued(job: Job, state: str) -> None:
    job.environment["STATE"] = state
    job.driver(on_term=130)
    process = job.start()
    job.wait_for("mergesearch up")
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENT) == 130
    assert not job.requeued


def test_sigterm_before_the_driver_started_requeues(job: Job) -> None:
    job.driver(on_term=130)
    (job.folder / "calls.sick").touch()
    process = job.start()
    job.wait_for("token 600")
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENT) == 130
    assert job.requeued
    assert not [call for call in job.calls if call.startswith("mergesearch")]


def test_a_head_that_dies_or_never_answers_fails_the_job(job: Job) -> None:
    job.driver(on_term=130)
    (job.folder / "calls.sick").touch()
    job.environment["MERGESEARCH_START_SECONDS"] = "2"
    process = job.start()
    assert process.wait(PATIENT) == 2
    assert process.stderr is not None
    assert "to answer at 127.0.0.1:24711" in process.stderr.read()
    (job.folder / "calls.dead").touch()
    job.environment["MERGESEARCH_START_SECONDS"] = "30"
    process = job.start()
    assert process.wait(PATIENT) == 2
    assert process.stderr is not None
    assert "received its end" in process.stderr.read()
    assert not job.requeued


def test_one_head_with_the_driver_and_a_worker_on_each_other_node(job: Job) -> None:
    job.driver(on_term=0)
    process = job.start(
        str(job.folder / "study.yaml"), str(job.folder / "run"), "--set", "budget.trials=9"
    )
    job.wait_for("mergesearch up")
    job.wait_for("token 600", times=2)  # steps start in their own time
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENT) == 0
    steps = [call for call in job.calls if call.startswith("srun ")]
    assert len(steps) == 2
    steps.sort(key=lambda call: "--head" not in call)  # which of them writes first is not ordered
    assert "--nodes=1 --ntasks=1 --nodelist=node1 ray start" in steps[0]
    assert "--head --node-ip-address=127.0.0.1 --port=24711" in steps[0]
    assert "--include-dashboard=false" in steps[0]
    assert "--nodes=2 --ntasks=2 --exclude=node1 ray start" in steps[1]
    assert steps[1].endswith("--address=127.0.0.1:24711")
    assert not [call for call in job.calls if call.startswith("ray stop")]
    driver = (
        f"mergesearch run {job.folder}/study.yaml --run {job.folder}/run --address 127.0.0.1:24711"
    )
    assert f"{driver} --progress json --set budget.trials=9" in job.calls
    assert {call for call in job.calls if call.startswith("token")} == {"token 600"}


def test_a_job_of_one_node_has_no_workers_beside_the_head(job: Job) -> None:
    job.environment["SLURM_JOB_NUM_NODES"] = "1"
    job.driver(on_term=0)
    process = job.start()
    job.wait_for("mergesearch up")
    job.wait_for("token 600")  # the step starts in its own time
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENT) == 0
    assert sum(call.startswith("srun ") for call in job.calls) == 1


@pytest.mark.parametrize("arguments", [["study.yaml"], ["/nowhere/study.yaml", "run"]])
def test_wrong_arguments_are_refused_before_anything_starts(job: Job, arguments: list[str]) -> None:
    process = job.start(*arguments)
    assert process.wait(PATIENT) == 2
    assert process.stderr is not None
    assert process.stderr.read().startswith("mergesearch.sbatch: expected")
    assert job.calls == []


def test_slurm_is_told_to_warn_and_to_requeue() -> None:
    told = re.findall(r"^#SBATCH (\S+)$", SBATCH.read_text(), re.MULTILINE)
    assert {"--requeue", "--signal=B:TERM@120", "--open-mode=append", "--exclusive"} <= set(told)
    first_command = next(
        number
        for number, line in enumerate(SBATCH.read_text().splitlines())
        if line and not line.startswith("#")
    )
    last_option = max(
        number
        for number, line in enumerate(SBATCH.read_text().splitlines())
        if line.startswith("#SBATCH")
    )
    assert last_option < first_command, "Slurm stops reading options at the first command"


# With Ray itself


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
def test_an_interrupted_job_resumes_to_the_same_trials_on_a_real_cluster(tmp_path: Path) -> None:
    job = Job(tmp_path)
    (job.bin / "ray").unlink()
    evaluator = {
        "kind": "synthetic",
        "problem": "sphere",
        "items": 10,
        "noise": 0.05,
        "seconds": 0.2,
    }
    study = write_study(analytic(trials=60, evaluators=[evaluator]), tmp_path)
    port = _port_below(30000)
    job.environment |= {
        "PATH": f"{job.bin}:{BIN}:{os.environ['PATH']}",
        "SLURM_JOB_ID": str(port - 20000 + 10000),
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_CPUS_PER_TASK": "1",
        "MERGESEARCH_START_SECONDS": str(PATIENT),
    }
    run = tmp_path / "run"
    process = job.start(str(study), str(run))
    try:
        finished = _finished_in(run, 15)
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(PATIENT)
    assert code == 130
    assert job.calls[-1].startswith("scontrol requeue")
    before = {record["number"]: record for record in _records(run)}
    assert len(before) >= finished
    assert job.start(str(study), str(run)).wait(PATIENT) == 0
    assert sum(call.startswith("scontrol requeue") for call in job.calls) == 1
    after = {record["number"]: record for record in _records(run)}
    assert len(after) > len(before)
    assert all(after[number] == record for number, record in before.items())
    folder = Path(f"/tmp/ray-{job.environment['SLURM_JOB_ID']}")
    assert not running_below(folder)
    shutil.rmtree(folder)


def _port_below(limit: int) -> int:
    """A free port that the script derives from some job's number."""
    for port in itertools.count(20000 + os.getpid() % 5000):
        assert port < limit
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError


def _records(run: Path) -> list[dict[str, Any]]:
    """Finished trials of a run: number, point and values."""
    from mergesearch.search.runs.opened import open_run

    return [
        {"number": r.number, "point": str(r.suggestion), "values": dict(r.values), "state": r.state}
        for r in open_run(run).log.records
        if r.state == "complete"
    ]


def _finished_in(run: Path, wanted: int) -> int:
    """Wait until so many trials of a live run are finished."""
    counts = [0]

    def enough() -> bool:
        with contextlib.suppress(RunFolderError):  # there is no study yet
            counts.append(len(_records(run)))
        return counts[-1] >= wanted

    wait_for(enough, pause=0.3)
    return counts[-1]


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
def test_the_head_of_compose_is_healthy_asks_for_its_token_and_takes_requests(
    tmp_path: Path,
) -> None:
    gcs, dashboard, agent = (free_port() for _ in range(3))
    moved = {
        "--port=6379": f"--port={gcs}",
        "--dashboard-port=8265": f"--dashboard-port={dashboard}",
        "--dashboard-agent-listen-port=52365": f"--dashboard-agent-listen-port={agent}",
        "--dashboard-host=0.0.0.0": "--dashboard-host=127.0.0.1",
    }
    head = COMPOSE["services"]["head"]
    words = [moved.pop(word, word) for word in head["command"]]
    assert not moved
    token = tmp_path / "token"
    token.write_text("0123456789abcdef" * 4 + "\n")
    environment = (
        os.environ
        | head["environment"]
        | {"RAY_AUTH_TOKEN_PATH": str(token), "PATH": f"{BIN}:{os.environ['PATH']}"}
    )
    urls = [
        word.replace("8265", str(dashboard)).replace("52365", str(agent))
        for word in head["healthcheck"]["test"][2:]
    ]
    folder = Path(f"/tmp/ray-docker-{os.getpid()}")  # short, for Ray's sockets
    process = subprocess.Popen(
        [BIN / "ray", *words, "--node-ip-address=127.0.0.1", f"--temp-dir={folder}"],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        healthy = [sys.executable, DOCKER / "answers.py", *urls]
        wait_for(lambda: not subprocess.run(healthy, capture_output=True).returncode, process)
        succeeds(
            sys.executable,
            DOCKER / "answers.py",
            "--status",
            "401",
            f"http://127.0.0.1:{dashboard}/api/jobs/",
        )
        at = environment | {"RAY_ADDRESS": f"127.0.0.1:{gcs}"}
        asked = [sys.executable, DOCKER / "request_cpus.py", "3x8", "echo", "and then the driver"]
        assert succeeds(*asked, env=at).endswith("and then the driver\n")
        status = [BIN / "ray", "status", "--address", f"127.0.0.1:{gcs}"]
        wait_for(lambda: "{'CPU': 8.0}: 3" in succeeds(*status, env=at), process, pause=1)
    finally:
        process.terminate()
        process.wait(PATIENT)
        shutil.rmtree(folder, ignore_errors=True)
