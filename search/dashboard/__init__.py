"""Serves runs in optuna-dashboard, behind access control."""
