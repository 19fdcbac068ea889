"""The paper's statements, one by one: what is measured for them, how they are decided, and how they are shown.

| module | holds |
|---|---|
| `cells` | one measurement, one file |
| `stages` | the models of `configuration/recipes/claims.yaml`, scored on the same text |
| `statements` | each statement, what decides it, and its verdict from the record |
| `figures` | what the record looks like |

`python -m benchmarks.claims RUN` gathers all measurements into `benchmarks/results/claims.json`.
"""
