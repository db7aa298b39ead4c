"""Pictures with captions: the procedural shapes, and shards in and out."""
