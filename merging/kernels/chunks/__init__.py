"""Vector code for numba: chunks of stored columns decoded, summed and elected in registers."""
