"""The model: its shape, the names of its places, its forward pass, and its files."""
