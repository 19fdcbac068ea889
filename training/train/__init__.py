"""Models from recipes: building, training, checkpoints."""
