"""Two hours of studies that are killed, moved, starved and resumed: `make soak`."""
