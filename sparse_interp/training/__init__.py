"""From text to weight-sparse models."""
