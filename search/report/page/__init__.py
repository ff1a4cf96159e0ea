"""The report as one HTML page, and pages of several runs."""
