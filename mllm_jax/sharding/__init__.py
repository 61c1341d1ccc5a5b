"""Sharding of arrays: the mesh, the rules from axis names to its axes, and the specs of weights and activations."""
