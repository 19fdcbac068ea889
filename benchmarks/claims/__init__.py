"""The paper's statements, one by one: what is measured for them, how they are decided, and how they are shown.

| module | holds |
|---|---|
| `cells` | one measurement, one file |
| `stages` | the models of `configuration/recipes/claims.yaml`, scored on the same text |
| `variants`, `probes`, `foreign` | what the recipe cannot express, inversions, other text and other models |
| `evidence` | numbers, comparisons with stated bounds, verdicts |
| `statements` | each statement, what decides it, and its verdict from the record |
| `gather`, `report`, `figures` | the record, the page, its figures |

`python -m benchmarks.claims RUN` gathers all measurements into `benchmarks/results/claims.json`.
"""
