"""The flat index of merged tensors, coefficients over it, and sources of tensors."""
