"""Models judged by people: outputs, pairs, and strengths from choices."""
