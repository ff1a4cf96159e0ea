"""Search strategies, one algorithm a file, behind one contract (``base``) and in one ``table``."""
