"""Items on disk: tables, folders of images and `datasets` folders, checked, divided and loaded."""
