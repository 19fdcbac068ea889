"""What a model holds: metrics, suites and instruments."""
