"""Experiment trackers that follow a study: TensorBoard, MLflow, Weights & Biases."""
