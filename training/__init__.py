"""Training, evaluation and publication of memory models; run from the checkout: `python -m training.<verb>`."""
