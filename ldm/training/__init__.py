"""How each part is learned: autoencoder, then CLIP, then cached latents, then the UNet."""
