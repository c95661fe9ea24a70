"""The method: latents, hypernetworks, layers, the proximal step, costs, pruning."""
