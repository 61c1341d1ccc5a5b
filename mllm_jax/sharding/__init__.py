"""Sharding of arrays: meshes, rules from logical axes to mesh axes, and specs of weights and activations."""
