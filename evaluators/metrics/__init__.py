"""Metrics: scores of answers, and values that are made of all items of a domain together."""
