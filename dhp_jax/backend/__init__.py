"""What makes XLA fast on the platform at hand."""
