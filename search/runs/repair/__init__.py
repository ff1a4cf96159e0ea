"""Repairs the journal of a run: what is damaged goes, all that stands is kept."""
