"""Faults for tests: workers that kill themselves, slow evaluations, wrong clocks.

Python imports this file at the start of every process that has its folder on PYTHONPATH; the
product does not know it.

FAULTS folder; the first worker that reaches a phase finds ``kill-PHASE`` there, removes it, and
dies by SIGKILL FAULT_SLOW seconds that every evaluation takes longer FAULT_SKEW seconds by which
this process's clock is wrong
"""

import importlib.abc
import importlib.util
import os
import signal
import sys
import time


def die(phase):
    try:
        os.unlink(os.path.join(os.environ["FAULTS"], f"kill-{phase}"))
    except FileNotFoundError:
        return
    os.kill(os.getpid(), signal.SIGKILL)


def break_worker(module):
    worker = module.Worker
    measure = module.measure_in_stages
    combine = worker._combine
    run = worker.run

    def broken_combine(self, recipe, seconds, **exactness):
        model = combine(self, recipe, seconds, **exactness)
        die("merge")
        return model

    def broken_measure(evaluate, watch):
        die("evaluate")
        time.sleep(float(os.environ.get("FAULT_SLOW", 0)))
        return measure(evaluate, watch)

    def broken_run(self, task):
        outcome = run(self, task)
        die("report")
        return outcome

    worker._combine = broken_combine
    worker.run = broken_run
    module.measure_in_stages = broken_measure


class Finder(importlib.abc.MetaPathFinder):
    """Finds ``mergesearch.search.workers.worker`` as usual and breaks it once it is loaded."""

    def find_spec(self, name, path, target=None):
        if name != "mergesearch.search.workers.worker":
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        load = spec.loader.exec_module

        def load_and_break(module):
            load(module)
            break_worker(module)

        spec.loader.exec_module = load_and_break
        return spec


if "FAULTS" in os.environ:
    sys.meta_path.insert(0, Finder())
if "FAULT_SKEW" in os.environ:
    right = time.time
    skew = float(os.environ["FAULT_SKEW"])
    time.time = lambda: right() + skew
