"""The command line of lm-evaluation-harness, which as of 0.4.13 looks for no models outside itself."""

import sys
from pathlib import Path

from lm_eval._cli import HarnessCLI
from lm_eval.utils import setup_logging

from . import adapter  # noqa: F401  (registers the model)

TASKS = Path(__file__).parent / "tasks"


def main(arguments: list[str] | None = None) -> int:
    """Run the harness with this package's model and tasks; its own tasks of the same names give way to these."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words and words[0] not in ("run", "ls", "validate"):
        words = ["run", *words]
    if "--include_path" not in words and words[:1] == ["run"]:
        words += ["--include_path", str(TASKS)]
    setup_logging()
    before, sys.argv = sys.argv, ["python -m modeling_memory.harness", *words]  # the harness reads it itself
    try:
        cli = HarnessCLI()
        cli.execute(cli.parse_args())
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        sys.argv = before
    return 0


if __name__ == "__main__":
    sys.exit(main())
