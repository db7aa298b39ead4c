"""What is learned: the autoencoder, the text encoder, the UNet, and CLIP that trains the text encoder."""
