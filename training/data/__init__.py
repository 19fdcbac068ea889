"""From text to batches: sources, token rows, objectives."""
