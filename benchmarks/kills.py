"""Kill a run with SIGKILL at random moments until it is done; its weights must be those of an undisturbed run.

```bash
python -m benchmarks.kills                       # 30 kills or more; goes on where it was stopped
```

Each session is the command `python -m training.run` on the debug recipe with short stages, forked from a process that
has done the imports, and killed after a random time. What counts: final weights equal bit by bit, and that no session
loses more steps than lie between two checkpoints.
"""

import argparse
import json
import math
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.measure import describe_run, save_record
from training.places import REPOSITORY
from training.recipes.recipe import load_recipe
from training.records.record import read_json, write_json
from training.run import main as run

SAVE_STEPS = 4
SETTINGS = {"max_steps": 24, "logging_steps": 1, "eval_steps": 8, "save_steps": SAVE_STEPS, "batch_size": 16}
RECIPE = "debug_cpu"


def stages() -> list[str]:
    """Names of the stages of a run."""
    return [stage.name for stage in load_recipe(RECIPE).stages]


def arguments(folder: Path) -> list[str]:
    """The command line of one run."""
    overrides = [f"stages.{stage}.training.{key}={value}" for stage in stages() for key, value in SETTINGS.items()]
    return [RECIPE, f"output_dir={folder}", "publish.verify=false", *overrides]


def session(folder: Path, seconds: float | None, log: Path) -> str | None:
    """Run, and kill it after so many seconds; returns what it was doing then, `None` if it was done before.

    Raises:
        RuntimeError: If it fails by itself.
    """
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        os._exit(run(arguments(folder)))
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            if status != 0:
                raise RuntimeError(f"the run ended with status {status}; see {log}")
            return None
        if seconds is not None and time.monotonic() - started >= seconds:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return moment(folder)
        time.sleep(0.01)


def moment(folder: Path) -> str:
    """What a run was doing when it was killed, from what it left."""
    begun = {path.parent.name for path in folder.glob("stages/*/started.json")}
    done = {path.parent.name for path in folder.glob("stages/*/stage.json")}
    if begun - done:
        stage = (begun - done).pop()
        if list(folder.glob(f"stages/{stage}/checkpoints/.part/*")):
            return f"stage {stage}, writing a checkpoint"
        return f"stage {stage}" + (", writing its model" if list(folder.glob(f"stages/{stage}/.*part")) else "")
    if len(done) == len(stages()):
        return "evaluation, figures, Hub folder"
    return "between stages" if done else "tokenizer and text"


def lost_steps(folder: Path) -> list[int]:
    """Steps that were done and had to be done again, one number for each session of a stage that was cut short."""
    lost = []
    for path in folder.glob("stages/*/sessions.json"):
        sessions = json.loads(path.read_text())
        lost += [
            max(before["to_step"] - after["from_step"], 0)
            for before, after in zip(sessions, sessions[1:], strict=False)
        ]
    return lost


def differing(left: Path, right: Path) -> list[str]:
    """Weights of any stage that are not equal bit by bit."""
    wrong = []
    for stage in stages():
        files = [side / "stages" / stage / "model" / "model.safetensors" for side in (left, right)]
        one, two = load_file(files[0]), load_file(files[1])
        names = one.keys() | two.keys()
        wrong += [
            f"{stage}.{name}"
            for name in names
            if name not in one or name not in two or not torch.equal(one[name], two[name])
        ]
    return wrong


def measure(
    kills: int, seed: int, folder: Path, minutes: float | None = None, *, hit: list[str] | None = None
) -> dict[str, Any] | None:
    """Kill runs until there were `kills` kills, some in each stage, and the last run is done.

    Args:
        kills (`int`): Kills at random moments, at least.
        seed (`int`): Seed of the moments.
        folder (`Path`): Where the runs go; a second call goes on there.
        minutes (`float`, *optional*): Begin no session after so many minutes, and return `None` if any is left.
        hit (`list[str]`, *optional*): Stages that must be hit; default: all.
    """
    hit = stages() if hit is None else hit
    end = math.inf if minutes is None else time.monotonic() + 60 * minutes
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "output.txt"
    straight = folder / "straight"
    if not (straight / "record.json").exists():
        started = time.monotonic()
        session(straight, None, log)
        write_json(folder / "straight.json", {"seconds": time.monotonic() - started})
    duration = read_json(folder / "straight.json")["seconds"]
    state = read_json(folder / "state.json") or {"moments": [], "lost": [], "runs": 0}

    def missing() -> bool:
        seen = {moment.partition(",")[0] for moment in state["moments"]}
        return len(state["moments"]) < kills or not seen >= {f"stage {name}" for name in hit}

    while missing() or (folder / "killed").exists():
        if time.monotonic() >= end:
            return None
        dice = random.Random(f"{seed} {len(state['moments'])} {state['runs']}")
        seconds = dice.uniform(0.02, 0.3) * duration
        what = session(folder / "killed", seconds, log)
        if what is None:
            wrong = differing(straight, folder / "killed")
            if wrong:
                raise RuntimeError(f"weights differ after kills: {', '.join(wrong[:5])}")
            state["runs"] += 1
            state["lost"] += lost_steps(folder / "killed")
            write_json(folder / "state.json", state)
            shutil.rmtree(folder / "killed")
            print(f"run {state['runs']} done, weights equal", flush=True)
        else:
            state["moments"].append(what)
            write_json(folder / "state.json", state)
            print(f"kill {len(state['moments'])}: {what}", flush=True)
    counts = {what: state["moments"].count(what) for what in sorted(set(state["moments"]))}
    return {
        "kills": len(state["moments"]),
        "runs": state["runs"],
        "weights_equal": True,  # a difference raises above
        "moments": counts,
        "steps_between_checkpoints": SAVE_STEPS,
        "steps_lost": state["lost"],
        "most_steps_lost": max(state["lost"], default=0),
        "seconds_undisturbed": round(duration, 2),
    }


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kills", description="Kill runs, compare weights.")
    parser.add_argument("--kills", type=int, default=30, help="kills at random moments, at least")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--folder", default="runs/kills", help="where the runs go")
    parser.add_argument("--minutes", type=float, help="stop after so many; the same command goes on")
    parser.add_argument("--out", help="file of the record; default: benchmarks/results/kills.json")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    options = build_parser().parse_args(argv)
    torch.set_num_threads(1)
    record = describe_run("kills", f"python -m benchmarks.kills --kills {options.kills}", {"moments": options.seed})
    metrics = measure(options.kills, options.seed, REPOSITORY / options.folder, options.minutes)
    if metrics is None:
        print("not done yet: the same command goes on")
        return 3
    record["metrics"] = metrics
    path = save_record(record, "kills", options.out)
    print(f"record: {path.relative_to(REPOSITORY) if path.is_relative_to(REPOSITORY) else path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
