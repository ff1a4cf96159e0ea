"""The report of a study: its headline, tables, figures, page and JSON."""
