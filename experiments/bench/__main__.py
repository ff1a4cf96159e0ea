"""``make bench``: every benchmark, one after the other."""

from experiments.bench import (
    changed,
    combine,
    command,
    cost,
    driver,
    gradient,
    language,
    league,
    merge,
    service,
    stored,
    strategies,
)

BENCHMARKS = (
    combine,
    stored,
    changed,
    gradient,
    driver,
    service,
    language,
    command,
    cost,
    merge,
    strategies,
    league,
)

for benchmark in BENCHMARKS:
    benchmark.main()
    print()
