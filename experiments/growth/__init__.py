"""Measures how cost grows: what experiment 25 puts into its tables and plots."""
