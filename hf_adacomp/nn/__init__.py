"""Modules that stand in a model: the compressed embedding, what trains it, the output head that shares it."""
