"""What a study takes from other runs: where it begins, and results that it need not ask for."""
