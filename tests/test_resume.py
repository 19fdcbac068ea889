"""Nothing is lost: killed, asked to leave or out of disk, a run ends with the weights of an undisturbed one."""

import json
import os
import re
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from modeling_memory import MemoryEncoderDecoderForCausalLM
from tests.memory_models import CHUNK, WINDOW, build_model
from tests.test_run import assert_same_weights, recipe, short_recipe  # noqa: F401  (fixtures)
from tests.test_trainer import SPECIAL, trainer
from training.data.objectives import BatchSpec
from training.data.rows import ObjectiveCollator
from training.recipes.recipe import load_recipe
from training.run import main
from training.train import checkpoints, stages
from training.train import trainer as trainer_module
from training.train.checkpoints import FROZEN, MANIFEST, SHARDS, last_complete_checkpoint
from training.train.trainer import MemoryTrainer

STAGES = ["autoencoder", "decoder", "blank_copy"]


class Killed(BaseException):
    """What a SIGKILL is to the code: nothing catches it. `test_kills.py` sends real ones."""


class At(TrainerCallback):
    """Calls something at the end of a step."""

    def __init__(self, step: int, action: Callable[[], Any]) -> None:
        self.step, self.action = step, action

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.action()


def once(function: Callable[..., Any], *, before: bool, skip: int = 0) -> Callable[..., Any]:
    """A function that is killed once: before its work is done or right after it, `skip` calls from now."""
    left = [skip]

    def killed(*arguments: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] == -1 and before:
            raise Killed
        result = function(*arguments, **options)
        if left[0] == -1:
            raise Killed
        return result

    return killed


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {}


MOMENTS: dict[str, tuple[Any, str, bool, int]] = {
    "while weights are written": (checkpoints, "save_file", False, 0),
    "before the checkpoint is renamed": (trainer_module, "commit", True, 1),
    "after it is renamed, before older ones are deleted": (trainer_module, "rotate", True, 1),
    "in an evaluation": (MemoryTrainer, "prediction_step", False, 1),
    "between stages": (stages, "replace_folder", False, 1),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_run_killed_at_a_moment_goes_on_to_the_same_weights(
    moment: str,
    short_recipe: Path,  # noqa: F811
    straight: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    if not straight:
        straight["run"] = short_recipe.parent / "straight"
        assert main([str(short_recipe), f"output_dir={straight['run']}"]) == 0
    owner, name, before, skip = MOMENTS[moment]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, once(getattr(owner, name), before=before, skip=skip))
        with pytest.raises(Killed):
            main([str(short_recipe), f"output_dir={tmp_path / 'killed'}"])
    assert main([str(short_recipe), f"output_dir={tmp_path / 'killed'}"]) == 0
    assert_same_weights(straight["run"], tmp_path / "killed", STAGES)


def test_sigterm_saves_and_leaves_and_the_same_command_goes_on(
    short_recipe: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert main([str(short_recipe), f"output_dir={whole}"]) == 0
    plain = MemoryTrainer.__init__

    def with_stop(self: MemoryTrainer, *arguments: Any, **options: Any) -> None:
        plain(self, *arguments, **options)
        if options["label"] == "decoder" and not (stopped / "stages" / "decoder" / "stage.json").exists():
            self.add_callback(At(3, lambda: signal.raise_signal(signal.SIGTERM)))
        if options["label"] == "blank_copy":
            self.add_callback(At(2, lambda: signal.raise_signal(signal.SIGTERM)))

    with monkeypatch.context() as patch:
        patch.setattr(MemoryTrainer, "__init__", with_stop)
        assert main([str(short_recipe), f"output_dir={stopped}"]) == 128 + signal.SIGTERM
        assert "stopped by SIGTERM; stage decoder is done" in capsys.readouterr().err
        assert main([str(short_recipe), f"output_dir={stopped}"]) == 128 + signal.SIGTERM
    error = capsys.readouterr().err
    assert "stopped by SIGTERM in stage blank_copy after step 3 of 4, with a checkpoint" in error
    folder = stopped / "stages" / "blank_copy"
    assert last_complete_checkpoint(folder / "checkpoints").name == "checkpoint-3"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert main([str(short_recipe), f"output_dir={stopped}"]) == 0
    assert_same_weights(whole, stopped, STAGES)
    check_sessions(folder)


def check_sessions(folder: Path) -> None:
    """A stage's seconds are those of its two sessions, from step 0 to 3 and from 3 to 4."""
    stage = json.loads((folder / "stage.json").read_text())
    first, second = json.loads((folder / "sessions.json").read_text())
    assert (first["from_step"], first["to_step"], second["from_step"], second["to_step"]) == (0, 3, 3, 4)
    assert stage["sessions"] == 2
    both = first["seconds"] + second["seconds"]  # the stage has beside them: the writing of its model
    assert both - 0.01 <= stage["seconds"] < both + 10


def test_sigterm_between_stages_leaves_at_once(short_recipe: Path, monkeypatch: pytest.MonkeyPatch):  # noqa: F811
    monkeypatch.setattr("training.run.prepare_inputs", lambda *a: signal.raise_signal(signal.SIGTERM))
    assert main([str(short_recipe)]) == 128 + signal.SIGTERM


def test_full_disk_keeps_the_last_checkpoint_and_training_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = trainer(tmp_path, max_steps=6, save_steps=2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    run.add_callback(At(3, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))))
    run.add_callback(At(5, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits)))
    kept: list[Path | None] = []
    run.add_callback(At(5, lambda: kept.append(last_complete_checkpoint(tmp_path))))
    try:
        run.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert kept[0] is not None and kept[0].name == "checkpoint-2"
    error = capsys.readouterr().err
    assert "checkpoint-4 could not be written" in error and "checkpoint-2 is kept. Training goes on" in error
    assert last_complete_checkpoint(tmp_path).name == "checkpoint-6"
    assert not (tmp_path / ".part" / "checkpoint-4").exists()


@pytest.mark.parametrize(
    ("tear", "message"),
    [
        (lambda folder: (folder / MANIFEST).unlink(), "was not written to its end"),
        (lambda folder: (folder / "optimizer.pt").unlink(), "optimizer.pt is missing"),
        (lambda folder: os.truncate(folder / "model.safetensors", 100), r"model.safetensors has 100 of \d+ bytes"),
        (lambda folder: (folder / MANIFEST).write_text("{"), "cannot be read"),
    ],
)
def test_torn_checkpoint_is_passed_over_with_a_message(tmp_path: Path, tear: Any, message: str):
    trainer(tmp_path, save_steps=2).train()
    said: list[str] = []
    tear(tmp_path / "checkpoint-4")
    assert last_complete_checkpoint(tmp_path, said.append).name == "checkpoint-2"
    assert len(said) == 1 and said[0].startswith("checkpoint-4 of ")
    assert re.search(message, said[0])


def test_frozen_weights_are_written_once_and_every_checkpoint_loads(tmp_path: Path):
    network = build_model("llama", "llama", freeze_encoder=True)
    collate = ObjectiveCollator(
        ["causal", "copy"], BatchSpec(SPECIAL, chunk_length=CHUNK, window_length=WINDOW, source_length=WINDOW)
    )
    run = trainer(tmp_path, network=network, collate=collate, save_steps=2)
    run.train()
    one, two = (tmp_path / f"checkpoint-{step}" / SHARDS["frozen"] for step in (2, 4))
    assert os.path.samefile(one, two) and os.path.samefile(one, tmp_path / FROZEN)
    loaded = MemoryEncoderDecoderForCausalLM.from_pretrained(tmp_path / "checkpoint-4").state_dict()
    state = network.state_dict()
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[name], state[name]) for name in state)
    trained = (tmp_path / "checkpoint-4" / SHARDS["trained"]).stat().st_size
    frozen = sum(p.nbytes for p in network.encoder.parameters())
    assert trained < sum(p.nbytes for p in network.parameters()) - frozen + 20_000


def test_frozen_weights_of_another_model_are_not_linked(tmp_path: Path):
    for seed in (0, 1):
        network = build_model("llama", "llama", freeze_encoder=True)
        with torch.no_grad():
            next(network.encoder.parameters()).add_(seed)
        checkpoints.save_split(network, tmp_path / str(seed), tmp_path)
        loaded = MemoryEncoderDecoderForCausalLM.from_pretrained(tmp_path / str(seed))
        assert torch.equal(next(loaded.encoder.parameters()), next(network.encoder.parameters()))


@pytest.mark.parametrize(
    "name", ["save_steps", "save_total_limit", "logging_steps", "eval_steps", "eval_rows", "num_workers"]
)
def test_settings_that_weights_do_not_depend_on_may_change_on_the_way(name: str, tmp_path: Path):
    """A stage that was killed goes on when its owner saves more often; with another seed it does not."""
    inputs: Any = SimpleNamespace(tokenizer=None, special_tokens=None, fingerprint="text")

    def identity(*overrides: str) -> dict[str, Any]:
        given = load_recipe("debug_cpu", overrides)
        return stages.StageRunner(given, tmp_path, inputs).identity(given.stage("copy"))

    before = identity()
    for stage in ("copy", "blank_copy", "decoder"):
        assert identity(f"stages.{stage}.training.{name}=3") == before
        assert identity(f"stages.{stage}.training.learning_rate=0.5") != before
