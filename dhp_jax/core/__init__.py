"""The method: latents, hypernetworks, layers, costs, pruning; the proximal step is `prox`."""
