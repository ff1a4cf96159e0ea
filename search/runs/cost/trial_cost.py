"""How long a trial takes on this machine: the base is evaluated, and one merge is made."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergesearch.merging import InputError
from mergesearch.merging.operators import get_operator
from mergesearch.merging.resident.card_memory import weight_bytes
from mergesearch.search.plan.plan import Plan
from mergesearch.search.record.run_folder import RunFolder
from mergesearch.search.workers.messages import Outcome, Task

if TYPE_CHECKING:
    from mergesearch.search.workers.worker import Worker

#: Items on which the first evaluation is made, which also warms up.
FIRST_ITEMS = 32
#: Seconds that the timed evaluation of a proposal may take, about; more items are extrapolated.
LONGEST = 20.0
#: Seconds of a trial beside merge and evaluation: the journal, the strategy, the checks.
OVERHEAD = 0.03


@dataclass(frozen=True)
class Cost:
    """What a trial takes.

    Attributes:
        prepare: Seconds until the first trial: items, weights and the model.
        merge: Seconds of a merge.
        evaluate: Seconds of all search items.
        items: Search items; 0 where there are none.
        timed: Items that were evaluated for this.
        base: Scores of the base on these.
    """

    prepare: float
    merge: float
    evaluate: float
    items: int
    timed: int
    base: Mapping[str, float]

    @property
    def trial(self) -> float:
        """Seconds of a trial."""
        return self.merge + self.evaluate + OVERHEAD

    def with_items(self, items: int) -> Cost:
        """The cost with fewer search items."""
        share = items / max(self.items, 1)
        return Cost(self.prepare, self.merge, self.evaluate * share, items, self.timed, self.base)

    def to_dict(self) -> dict[str, Any]:
        """The cost as JSON."""
        return asdict(self) | {"base": dict(self.base), "trial": self.trial}


def bytes_of_trial(plan: Plan) -> tuple[int, int]:
    """Bytes that one merge reads and writes; zeros for problems without weights."""
    if plan.family is None:
        return 0, 0
    operator = get_operator(plan.template.operator)
    weights = weight_bytes(plan.family, operator, plan.template.options, plan.spec.rows)
    return weights.base + weights.rows, weights.merged


def measure_cost(plan: Plan, folder: Path, longest: float = LONGEST) -> Cost | str:
    """Time the base and a merge of a planned study, or say why that is not done.

    Args:
        plan: The study.
        folder: Where prepared weights may lie for a while.
        longest: Seconds that the timed evaluation may take, about; more items are extrapolated.

    Raises:
        InputError: If the base cannot be evaluated.
    """
    # Imported on demand: both load torch, which a plan alone does without.
    from mergesearch.search.runs.wiring import worker_spec
    from mergesearch.search.workers.worker import Worker

    needed, _ = bytes_of_trial(plan)  # what is prepared is what a merge reads
    if 2 * needed > shutil.disk_usage(folder).free:
        return f"{needed / 1e9:.1f} GB of prepared weights, for which the disk has little room"
    with tempfile.TemporaryDirectory(dir=folder, prefix=".mergesearch-cost-") as scratch:
        started = time.perf_counter()
        worker = Worker(worker_spec(plan, RunFolder(Path(scratch) / "run")))
        items = plan.evaluator.size("search")
        first = min(items, FIRST_ITEMS)
        _outcome(worker, plan, first or None, "base")
        prepare = time.perf_counter() - started
        some = _outcome(worker, plan, first or None, "base")
        seconds = some.seconds["evaluate"]
        timed = items
        if items and seconds * items / first > longest:
            timed = min(items, max(first, int(longest * first / seconds)))
        merged = _outcome(worker, plan, timed or None, "start")
        whole = merged if timed == first else _outcome(worker, plan, timed or None, "base")
        base = some if timed == first else whole
        assert base.measurement is not None
        return Cost(
            prepare,
            merged.seconds["merge"],
            merged.seconds["evaluate"] * (items / timed if timed else 1.0),
            items,
            timed,
            dict(base.measurement.values),
        )


def _outcome(worker: Worker, plan: Plan, items: int | None, which: str) -> Outcome:
    """A trial of the base, or of the merge at the start of the search.

    Raises:
        InputError: If it fails.
    """
    recipe = plan.reference("base")
    if which == "start":
        recipe = plan.space.decode(plan.space.start)
    if items is not None and items >= plan.evaluator.size("search"):
        items = None
    outcome = worker.run(Task(which, recipe, "search", items=items))
    if outcome.failure is not None:
        raise InputError(
            f"the study does not run: the {which} could not be evaluated "
            f"({' '.join(outcome.failure.message.split())[:300]}); see "
            "`mergesearch help evaluators` for what data and models must have"
        )
    return outcome
