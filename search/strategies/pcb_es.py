"""The preset of PCB-merging with evolution: NGOpt in a narrow box around the closed form.

Du 2024, "Parameter Competition Balancing for Model Merging" (arXiv 2410.02396): one coefficient in
[0.8, 1.3] for each model, from 1, 100 evaluations. The operator ``pcb`` weighs the task vectors;
the coefficients only correct it, hence the narrow box. The box, the start and the granularity are
the entry's ``preset``. The paper names CMA-ES, the released script calls NGOpt of nevergrad; with
two workers or more it chooses CMA-ES (:mod:`mergesearch.search.strategies.nevergrad`).
"""

from __future__ import annotations

from mergesearch.search.strategies.base import Problem
from mergesearch.search.strategies.lorahub import check_dimension
from mergesearch.search.strategies.nevergrad import Nevergrad


class PcbEs(Nevergrad):
    """NGOpt with the preset of PCB-merging.

    Args:
        problem: The box and how losses combine.
        seed: Seed of the strategy's generators.
    """

    def __init__(self, problem: Problem, seed: int) -> None:
        check_dimension("pcb_es", problem)
        super().__init__(problem, seed, optimizer="NGOpt")
