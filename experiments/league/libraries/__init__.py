"""Libraries behind one adapter; this package runs in an environment of its own.

It imports nothing of ours beyond itself: ``experiments.league.library_player`` starts it.
"""
