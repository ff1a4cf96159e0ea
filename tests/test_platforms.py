"""What other systems than Linux lack is not needed to import the package and to merge in memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
#: What Windows lacks, and macOS in part. Modules are hidden from our own imports alone: libraries
#: have chosen theirs by ``sys.platform``, which is Linux here.
ELSEWHERE = """
import builtins, importlib, mmap, os, pkgutil, signal, socket
import torch
import transformers

HIDDEN = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty"}
ABSENT = {
    os: "O_CLOEXEC O_DIRECTORY O_NOFOLLOW O_NONBLOCK fork geteuid getgid getpgid getuid killpg "
    "posix_fadvise posix_fallocate pread preadv pwrite pwritev register_at_fork "
    "sched_getaffinity sched_setaffinity setsid statvfs sysconf uname waitid",
    signal: "ITIMER_REAL SIGALRM SIGCHLD SIGCONT SIGHUP SIGKILL SIGQUIT SIGSTOP SIGUSR1 SIGUSR2 "
    "alarm pthread_sigmask setitimer",
    mmap: "MADV_DONTNEED MADV_RANDOM MADV_SEQUENTIAL MADV_WILLNEED MAP_PRIVATE MAP_SHARED "
    "PROT_READ PROT_WRITE",
    socket: "AF_UNIX",
}
#: They need other packages, whose imports take half of the time.
SKIPPED = ("mergesearch.evaluators.harness", "mergesearch.merging.kernels.triton_")
plain = builtins.__import__


def elsewhere(name, globals=None, locals=None, fromlist=(), level=0):
    ours = str((globals or {}).get("__name__")).startswith("mergesearch")
    if ours and not level and name.partition(".")[0] in HIDDEN:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return plain(name, globals, locals, fromlist, level)


def walk(package):
    for found in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        if not found.name.startswith(SKIPPED) and not found.name.endswith("__main__"):
            module = importlib.import_module(found.name)
            names.append(found.name)
            if found.ispkg:
                walk(module)


builtins.__import__ = elsewhere
for module, absent in ABSENT.items():
    for name in absent.split():
        delattr(module, name)
import mergesearch

names = []
walk(mergesearch)
experts = {name: {"w": torch.full((3,), value)} for name, value in (("a", 1.0), ("b", 2.0))}
merged = mergesearch.merge({"w": torch.zeros(3)}, experts)
print(len(names), merged["w"].tolist())
"""


def test_everything_imports_and_merges_without_what_other_systems_lack() -> None:
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-3000:]
    count, merged = done.stdout.splitlines()[-1].split(" ", 1)
    assert int(count) > 400
    assert merged.startswith("[0.9")  # 0.3 of each task vector
