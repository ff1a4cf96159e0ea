"""Tasks of the language-model evaluation harness, scored on the resident model."""
