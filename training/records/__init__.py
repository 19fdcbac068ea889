"""What a run leaves: its record, and the pages and figures drawn from it."""
