"""Everything that follows a running study: progress, event log, Prometheus, trackers."""
