"""The mathematics of diffusion, without a learned part of its own."""
