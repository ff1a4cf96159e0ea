"""A league of strategies and libraries on problems whose noise is that of real scores."""
