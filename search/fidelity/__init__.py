"""Rules that stop trials early, and estimates of what these would have scored."""
