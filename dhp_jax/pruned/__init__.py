"""What a pruned network can become."""
