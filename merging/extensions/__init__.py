"""Members of the product's tables that other packages and users' programs add."""
