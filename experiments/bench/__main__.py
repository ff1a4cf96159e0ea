"""``make bench``: every benchmark, one after the other."""

from experiments.bench import (
    combine,
    command,
    driver,
    gradient,
    language,
    merge,
    service,
    strategies,
)

for benchmark in (combine, gradient, driver, service, language, command, merge, strategies):
    benchmark.main()
    print()
