"""Bridges between a sparse and a dense model: maps of their streams, training, use, and what they are worth."""
