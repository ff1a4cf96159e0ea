"""``make bench``: every benchmark, one after the other."""

from experiments.bench import combine, command, driver, merge

for benchmark in (combine, driver, command, merge):
    benchmark.main()
    print()
