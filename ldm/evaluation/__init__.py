"""How good the pictures are: metrics, and the oracle that reads the procedural shapes back."""
