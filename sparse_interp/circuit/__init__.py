"""Circuits: what they are, how they are found, described and kept."""
