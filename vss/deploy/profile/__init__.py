"""Time per layer: measured, modelled and kept in tables."""
