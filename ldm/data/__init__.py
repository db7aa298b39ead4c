"""Pictures with captions: the procedural shapes, shards in and out, and batches from them."""
