"""What is proven without a GPU, proven again on one: ``python -m experiments.gpu_check``."""
