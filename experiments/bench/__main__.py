"""``make bench``: every benchmark, one after the other."""

from experiments.bench import combine, command, driver, gradient, merge, strategies

for benchmark in (combine, gradient, driver, command, merge, strategies):
    benchmark.main()
    print()
