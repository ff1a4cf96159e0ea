"""What is expected of merges between measured trials, as opposed to what was measured."""
