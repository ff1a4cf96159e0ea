"""The contracts of operators, strategies, spaces and evaluators, for the tests of plug-ins."""
