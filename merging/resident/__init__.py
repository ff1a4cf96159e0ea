"""Weights that stay in memory between trials: arenas, the merged model, and its gradients."""
