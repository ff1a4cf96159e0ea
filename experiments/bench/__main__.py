"""``make bench``: every benchmark, one after the other."""

from experiments.bench import combine, command, driver

for benchmark in (combine, driver, command):
    benchmark.main()
    print()
