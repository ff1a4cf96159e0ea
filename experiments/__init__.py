"""The experiments, the zoos of small models, and the benchmarks; not shipped with the product."""
