"""Chains of the project's own commands: the comparison of strategies, the demonstration, the benchmark."""
