"""Studies from Python programs and notebooks, by the code that the command line runs too."""
