"""What a user runs: generation, comparison, training."""
