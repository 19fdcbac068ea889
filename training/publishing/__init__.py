"""Hub folders: cards, checks in a clean process, and the push."""
