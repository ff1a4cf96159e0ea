"""``make bench``: every benchmark, one after the other."""

from experiments.bench import combine, command, driver, gradient, language, merge, strategies

for benchmark in (combine, gradient, driver, language, command, merge, strategies):
    benchmark.main()
    print()
