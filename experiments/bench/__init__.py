"""Performance figures as ratios inside one run: absolute times of a shared machine mean little."""
