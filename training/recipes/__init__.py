"""Recipes: reading them strictly, and queues over them."""
