"""Building blocks that several search strategies share."""
