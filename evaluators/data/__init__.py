"""Items on disk: tables, folders of files and `datasets` folders, checked, divided and loaded."""
