"""Recorded recommendations: a difference is a change of algorithm and needs a line in
CHANGELOG.md.
"""
