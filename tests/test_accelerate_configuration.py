"""Every launch file is read by accelerate's own launcher, up to the moment where it would start processes."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands import launch
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env, prepare_simple_launcher_cmd_env

from training.places import REPOSITORY
from training.recipes.recipe import load_recipe
from training.run import build_parser

FOLDER = REPOSITORY / "configuration" / "accelerate"
FILES = sorted(FOLDER.glob("*.yaml"))
PREPARE = {
    "simple_launcher": lambda args: prepare_simple_launcher_cmd_env(args)[1],
    "multi_gpu_launcher": prepare_multi_gpu_env,
    "deepspeed_launcher": lambda args: prepare_deepspeed_cmd_env(args)[1],
}
EXPECTED = {
    "one_gpu": ("simple_launcher", 1, 1),
    "ddp": ("multi_gpu_launcher", 2, 1),
    "cpu_two_processes": ("multi_gpu_launcher", 2, 1),
    "fsdp2": ("multi_gpu_launcher", 2, 1),
    "zero2": ("deepspeed_launcher", 2, 1),
    "zero3": ("deepspeed_launcher", 2, 1),
    "multi_node": ("multi_gpu_launcher", 16, 2),
}


def dry_run(
    path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str] | None = None
) -> tuple[str, Any, dict[str, str]]:
    """What `accelerate launch` would start: the launcher, its arguments, the processes' environment."""
    started: list[tuple[str, Any, dict[str, str]]] = []
    for name, prepare in PREPARE.items():
        monkeypatch.setattr(
            launch, name, lambda args, name=name, prepare=prepare: started.append((name, args, prepare(args)))
        )
    monkeypatch.chdir(REPOSITORY)
    given = words or ["--config_file", str(path), "-m", "training.run", "configuration/recipes/debug_cpu.yaml"]
    arguments = launch.launch_command_parser().parse_args(given)
    launch.launch_command(arguments)
    (result,) = started
    return result


def test_the_files_that_are_promised_are_there():
    assert {path.stem for path in FILES} == set(EXPECTED)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_launch_file_says_what_it_is_for(path: Path):
    header = path.read_text().split("\n\n")[0]
    for key in ("# Purpose:", "# Command:", "# Hardware:", "# Frozen:"):
        assert f"\n{key}" in f"\n{header}"
    assert f"configuration/accelerate/{path.name}" in header
    assert ("not run for this release" in header) == (path.stem != "cpu_two_processes")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_dry_run_starts_what_the_file_says(path: Path, monkeypatch: pytest.MonkeyPatch):
    launcher, arguments, environment = dry_run(path, monkeypatch)
    assert (launcher, arguments.num_processes, arguments.num_machines) == EXPECTED[path.stem]
    assert arguments.module and arguments.training_script == "training.run"
    assert environment["ACCELERATE_MIXED_PRECISION"] == "no"  # the trainer casts by itself


def test_fsdp2_plugin_is_what_the_file_says(monkeypatch: pytest.MonkeyPatch):
    _, _, environment = dry_run(FOLDER / "fsdp2.yaml", monkeypatch)
    for name, value in environment.items():
        if name.startswith(("FSDP_", "ACCELERATE_USE_FSDP")):
            monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert plugin.transformer_cls_names_to_wrap == ["LlamaDecoderLayer"]
    assert not plugin.cpu_ram_efficient_loading


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_plugin_is_what_the_file_says(stage: int, monkeypatch: pytest.MonkeyPatch):
    _, _, environment = dry_run(FOLDER / f"zero{stage}.yaml", monkeypatch)
    for name, value in environment.items():
        if name.startswith(("ACCELERATE_DEEPSPEED", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_CONFIG_DS")):
            monkeypatch.setenv(name, value)
    plugin = DeepSpeedPlugin()
    assert plugin.zero_stage == stage
    assert plugin.deepspeed_config["zero_allow_untested_optimizer"] is True
    assert plugin.is_zero3_init_enabled() is False
    assert json.loads((FOLDER / f"zero{stage}.json").read_text())["zero_optimization"]["stage"] == stage


def commands_of_the_page() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", (REPOSITORY / "docs" / "scaling.md").read_text(), re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line]


@pytest.mark.parametrize("command", commands_of_the_page())
def test_commands_of_the_page_are_read_by_launcher_and_recipe(command: str, monkeypatch: pytest.MonkeyPatch):
    words = shlex.split(command)
    if words[0] == "accelerate":
        assert words[:3] == ["accelerate", "launch", "--config_file"]
        _, arguments, _ = dry_run(REPOSITORY / words[3], monkeypatch, words[2:])
        module, words = arguments.training_script, [arguments.training_script, *arguments.training_script_args]
    else:
        module, words = words[2], words[2:]
    assert module == "training.run"
    options = build_parser().parse_args(words[1:])
    assert load_recipe(options.recipe, options.overrides).stages


def test_page_names_every_launch_file():
    page = (REPOSITORY / "docs" / "scaling.md").read_text()
    assert all(f"configuration/accelerate/{path.name}" in page for path in FILES)
