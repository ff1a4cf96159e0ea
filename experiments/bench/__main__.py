"""``make bench``: every benchmark, one after the other."""

from experiments.bench import (
    changed,
    combine,
    command,
    cost,
    driver,
    gradient,
    hidden_states,
    language,
    league,
    merge,
    preparation,
    record,
    service,
    stored,
    strategies,
)

BENCHMARKS = (
    combine,
    stored,
    changed,
    hidden_states,
    gradient,
    preparation,
    driver,
    service,
    record,
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
