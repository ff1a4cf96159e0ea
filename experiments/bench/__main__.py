"""``make bench``: every benchmark, one after the other."""

from experiments.bench import combine, command, driver, merge, strategies

for benchmark in (combine, driver, command, merge, strategies):
    benchmark.main()
    print()
