"""Score the stages of the claims' run, and gather all measurements into `benchmarks/results/claims.json`.

```bash
python -m training.run claims
python -m benchmarks.claims.variants runs/claims --to runs/claims_cells
python -m benchmarks.claims.probes runs/claims --to runs/claims_cells
python -m benchmarks.claims runs/claims --cells runs/claims_cells
python -m benchmarks.render
```

Stages that are scored already are not scored again, and a run that is not finished gives a record of what there is.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.claims.evidence import Study
from benchmarks.claims.gather import gather
from benchmarks.claims.scoring import load_text
from benchmarks.claims.stages import score_stages
from benchmarks.claims.statements import count_parts, load_statements, verdict_of
from benchmarks.measure import RESULTS
from training.command_line import run_command
from training.places import portable_path
from training.recipes.recipe import load_recipe
from training.records.record import write_record


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.claims", description="Score a run of the recipe claims and decide the statements."
    )
    parser.add_argument("run", metavar="RUN", help="folder of python -m training.run claims")
    parser.add_argument(
        "--cells",
        action="append",
        default=[],
        metavar="FOLDER",
        help="folder with measurements of benchmarks.claims.variants and probes; several times. "
        "The first also keeps the scores of the stages (default: runs/claims_cells)",
    )
    parser.add_argument("--out", default=str(RESULTS / "claims.json"), metavar="FILE", help="where the record goes")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="processor threads (default 1)")
    return parser


def run(options: argparse.Namespace, command: str) -> dict[str, Any]:
    """Score, gather, decide; return the record."""
    torch.set_num_threads(options.threads)
    source, folders = Path(options.run), [Path(folder) for folder in options.cells or ["runs/claims_cells"]]
    text = load_text(source)
    own = score_stages(source, text, folders[0])
    record = gather(source, load_recipe("claims"), text, own, folders, command)
    write_record(Path(options.out), record)
    study = Study(record)
    for key, statement in load_statements().items():
        decided = statement.decide(study)
        print(f"{key:>3}  {verdict_of(decided).value:<24} {statement.title} {count_parts(decided)}".rstrip())
    if record["missing_stages"]:
        print(f"not trained yet: {', '.join(record['missing_stages'])}")
    print(f"record: {portable_path(options.out)}")
    return record


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return run_command(build_parser(), run, arguments)


if __name__ == "__main__":
    sys.exit(main())
