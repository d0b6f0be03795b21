"""Octant: a 3D-parallel training engine for Llama-family language models."""

__version__ = "0.1.0"
