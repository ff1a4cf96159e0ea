"""One study in one folder: run it, resume it, read it, publish its report, export its trials."""
