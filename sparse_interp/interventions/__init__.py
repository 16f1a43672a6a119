"""Changing activations: ablation, and the learned masks that are built on it."""
