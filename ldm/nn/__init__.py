"""Layers that know nothing of diffusion or text."""
