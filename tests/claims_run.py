"""A tiny run of the claims' recipe for tests: stages of the right shape with fresh weights, and a little text."""

from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import PartialState

from benchmarks.claims.source import Source, open_run
from training.recipes.recipe import Recipe, load_recipe
from training.records.record import write_json
from training.train.build import build_stage_model
from training.train.inputs import prepare_inputs

WORDS = ("the cat sat on the mat", "and the dog ran to the inn", "some birds flew over a house", "we saw it all")
SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_heads": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
}


def tiny_recipe(folder: Path) -> Recipe:
    """The claims' recipe on three small texts, two steps of four rows for each stage, models of width 16."""
    overrides = []
    for seed, split in enumerate(("train", "validation", "test")):
        order = torch.randint(len(WORDS), (600,), generator=torch.Generator().manual_seed(seed))
        file = folder / f"{split}.txt"
        file.write_text("\n".join(f"{split} {WORDS[i]}" for i in order.tolist()), encoding="utf-8")
        overrides.append(f"data.{split}=[{file}]")
    overrides.append("tokenizer.vocab_size=300")
    for stage in load_recipe("claims").stages:
        overrides += [f"stages.{stage.name}.training.{key}" for key in ("max_steps=2", "batch_size=4")]
    recipe = load_recipe("claims", overrides)
    for stage in recipe.stages:
        for part in (stage.model, stage.model.get("encoder"), stage.model.get("decoder")):
            for name, value in SMALL.items():
                if isinstance(part, dict) and part.get(name, 0):
                    part[name] = value
    return recipe


def tiny_run(folder: Path, stages: Sequence[str]) -> Source:
    """Lay a run out with these stages, untrained."""
    folder.mkdir(parents=True)
    recipe, run = tiny_recipe(folder), folder / "run"
    prepare_inputs(recipe, run / "inputs", PartialState(cpu=True))
    source = open_run(run, recipe)
    for name in stages:
        torch.manual_seed(sum(map(ord, name)))
        add_stage(source, name)
    return source


def add_stage(source: Source, name: str) -> None:
    """Give the run a stage, untrained."""
    model = build_stage_model(
        source.stage(name),
        special_tokens=source.inputs.special_tokens,
        vocab_size=source.vocab_size,
        load=source.load,
    )
    place = source.model_folder(name)
    model.save_pretrained(place)
    source.inputs.tokenizer.save_pretrained(place)
    write_json(place.parent / "started.json", {"stage": name})
