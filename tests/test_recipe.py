"""A recipe says everything about a run; whatever it cannot mean is refused with its path and a remedy."""

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import yaml

from training.recipes.recipe import REPOSITORY, Recipe, load_recipe, resolve_files

RECIPES = sorted((REPOSITORY / "configuration" / "recipes").glob("*.yaml"))

RAW = {
    "name": "tiny",
    "data": {"train": ["a.txt"], "validation": ["b.txt"], "test": ["c.txt"]},
    "stages": [
        {
            "name": "autoencoder",
            "kind": "autoencoder",
            "model": {"chunk_length": 4, "encoder": {"model_type": "masked_mixer"}},
            "data": {"row_length": 4},
            "training": {"max_steps": 2},
        },
        {
            "name": "decoder",
            "kind": "causal_lm",
            "model": {"model_type": "llama"},
            "data": {"row_length": 16},
            "training": {"max_steps": 2, "learning_rate": 1},
        },
        {
            "name": "copying",
            "kind": "memory",
            "from": {"encoder": "autoencoder", "decoder": "decoder"},
            "objectives": {"copy": 1.0},
            "data": {"row_length": 16},
            "training": {"max_steps": 2},
        },
    ],
}


def write(folder: Path, raw: object) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return path


def load(folder: Path, *overrides: str, raw: object = RAW) -> Recipe:
    return load_recipe(write(folder, raw), overrides)


def test_values_defaults_and_types(tmp_path: Path):
    recipe = load(tmp_path)
    assert recipe.stage("decoder").training.learning_rate == 1.0
    assert type(recipe.stage("decoder").training.learning_rate) is float
    assert recipe.stage("copying").from_ == {"encoder": "autoencoder", "decoder": "decoder"}
    assert recipe.seed == 0 and recipe.published_stage == "copying"


def test_overrides_reach_stages_by_name_and_leave_the_file_alone(tmp_path: Path):
    overrides = ["seed=3", "stages.decoder.training.max_steps=9", "stages.copying.objectives={copy: 0.5, causal: 1}"]
    recipe = load(tmp_path, *overrides, "tokenizer.vocab_size=300", "stages.decoder.training.lr_multipliers.head=2")
    assert recipe.seed == 3 and recipe.tokenizer.vocab_size == 300
    assert recipe.stage("decoder").training.max_steps == 9
    assert recipe.stage("decoder").training.lr_multipliers == {"head": 2.0}
    assert recipe.stage("copying").objectives == {"copy": 0.5, "causal": 1.0}
    assert load(tmp_path).seed == 0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sede=3", r"unknown key sede \(did you mean seed\?\)"),
        ("stages.decoder.training.max_step=3", r"stages\.decoder\.training\.max_step .*mean max_steps"),
        ("stages.decodr.training.max_steps=3", r"no stage 'decodr' \(did you mean decoder\?\)"),
        ("stages.decoder.training.learning_rate=1e-4", r"learning_rate is the text '1e-4'.*write 1\.0e-4"),
        ("stages.decoder.model.rms_norm_eps=1e-6", r"model\.rms_norm_eps is the text '1e-6'.*write 1\.0e-6"),
        ("stages.decoder.training.max_steps=2.5", r"max_steps is 2\.5 \(float\), expected int"),
        ("stages.decoder.training.max_steps=true", r"max_steps is True \(bool\), expected int"),
        ("stages.decoder.training.max_steps=0", "max_steps is 0, expected 1 or more"),
        ("stages.decoder.training.bf16=1", r"bf16 is 1 \(int\), expected bool"),
        ("stages.decoder.training.optimizer=muom", r"optimizer is 'muom' \(did you mean muon\?\)"),
        ("stages.decoder.training.warmup=0.9", "warmup 0.9 .* decay 0.3"),
        ("stages.decoder.training.lr_multipliers={'(': 2}", r"'\(' is no regular expression"),
        ("stages.decoder.kind=memroy", r"kind is 'memroy' \(did you mean memory\?\)"),
        ("stages.decoder.name=autoencoder", "defined twice"),
        ("stages.decoder.objectives={copy: 1.0}", "copy is no objective of a stage of kind causal_lm"),
        ("stages.decoder.objectives={causal: 0}", "weight must be above 0"),
        ("stages.copying.objectives={copi: 1.0}", r"objectives\.copi .*did you mean copy"),
        ("stages.copying.objectives={}", "objectives is empty"),
        ("stages.copying.from={encoder: autoencoder}", "expected encoder and decoder, or model"),
        ("stages.copying.from={encoder: autoencoder, decoder: autoencoder}", "autoencoder; expected causal_lm"),
        ("stages.copying.from={encoder: autoencoder, decoder: decodr}", r"'decodr' \(did you mean decoder\?\)"),
        ("stages.autoencoder.from={model: decoder}", "expected an earlier stage"),
        ("stages.copying.data.window_length=8", "window_length is for causal_lm"),
        ("stages.copying.data.source_length=32", "source_length 32 exceeds row_length 16"),
        ("stages.decoder.data.window_length=5", "no multiple of window_length 5"),
        ("stages.copying.data.every={copi: 4}", r"every\.copi: .* no such objective \(did you mean copy\?\); it has"),
        ("stages.decoder.data.every={causal: 4}", "it has its only one, which takes all rows"),
        ("stages.copying.data.every={copy: 0}", r"every\.copy is 0, but must divide training\.batch_size 64"),
        ("stages.copying.data.every={copy: 5}", r"every\.copy is 5, but must divide training\.batch_size 64"),
        ("evaluation.no_memory=copying", "stage of kind memory; expected causal_lm"),
        ("evaluation.suites=[copie]", r"'copie' \(did you mean copy\?\)"),
        ("evaluation.suites=copy", r"expected a list: write \[copy\]"),
        ("publish.stage=decoder", "expected memory or autoencoder"),
        ("name=a/b", "becomes a folder"),
        ("name=7", r"name is 7 \(int\), expected str"),
        ("stages=[]", "stages is empty"),
        ("data.train.x=1", "a list cannot be entered at .x.; give it whole"),
        ("stages.decoder.training.max_steps.x=1", "lies below 2, which is a value, not a mapping"),
        ("seed", "not of the form key=value"),
        ("seed=[", "no valid YAML"),
    ],
)
def test_mistakes_are_refused_with_path_and_remedy(tmp_path: Path, override: str, message: str):
    with pytest.raises(ValueError, match=message):
        load(tmp_path, override)


def test_missing_key_is_named(tmp_path: Path):
    raw = copy.deepcopy(RAW)
    del raw["stages"][1]["training"]["max_steps"]
    with pytest.raises(ValueError, match=r"stages\.decoder\.training\.max_steps is missing"):
        load(tmp_path, raw=raw)


def test_continued_stage_keeps_its_model(tmp_path: Path):
    raw = copy.deepcopy(RAW)
    later = {"name": "later", "from": {"model": "copying"}, "model": {"window_length": 8}}
    raw["stages"].append({**raw["stages"][2], **later})
    with pytest.raises(ValueError, match="a continued stage keeps its model"):
        load(tmp_path, raw=raw)
    assert load(tmp_path, "stages.later.model={freeze_decoder: true}", raw=raw).stage("later").kind == "memory"


def test_a_causal_lm_may_be_an_encoder_but_a_memory_model_may_not(tmp_path: Path):
    recipe = load(tmp_path, "stages.copying.from={encoder: decoder, decoder: decoder}")
    assert recipe.stage("copying").from_ == {"encoder": "decoder", "decoder": "decoder"}
    raw = copy.deepcopy(RAW)
    raw["stages"].append({**raw["stages"][2], "name": "later", "from": {"encoder": "copying", "decoder": "decoder"}})
    with pytest.raises(ValueError, match="stage of kind memory; expected autoencoder or causal_lm"):
        load(tmp_path, raw=raw)


def test_repeated_key_is_refused_but_anchors_may_be_merged(tmp_path: Path):
    text = write(tmp_path, RAW).read_text()
    (tmp_path / "twice.yaml").write_text(text + "\nname: other\n")
    with pytest.raises(ValueError, match="'name' is given twice"):
        load_recipe(tmp_path / "twice.yaml")
    raw = copy.deepcopy(RAW)
    raw["stages"] = raw["stages"][:1]
    text = yaml.safe_dump(raw).replace("training:\n", "training: &t\n")
    text += (
        "- {name: again, kind: autoencoder, from: {model: autoencoder}, data: {row_length: 4}, training: {<<: *t}}\n"
    )
    (tmp_path / "merged.yaml").write_text(text)
    assert load_recipe(tmp_path / "merged.yaml").stage("again").training.max_steps == 2


def test_missing_recipe_and_non_mapping_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="nowhere.yaml was not found; .*debug_cpu"):
        load_recipe("nowhere.yaml")
    with pytest.raises(ValueError, match="expected a mapping"):
        load(tmp_path, raw=["a"])


def test_missing_file_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"data\.train: no file matches 'no/such-\*\.parquet'"):
        resolve_files(["no/such-*.parquet"], "data.train")
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "a.txt").write_text("a")
    assert [path.name for path in resolve_files([f"{tmp_path}/*.txt"])] == ["a.txt", "b.txt"]


def test_saved_recipe_has_no_absolute_path_and_loads_again(tmp_path: Path):
    recipe = load(tmp_path, f"data.train=['{tmp_path}/a.txt', '{REPOSITORY}/README.md']", f"output_dir={tmp_path}/out")
    saved = recipe.to_mapping()
    assert str(tmp_path) not in json.dumps(saved) and "from_" not in json.dumps(saved)
    assert saved["data"]["train"] == ["a.txt", "README.md"]
    (tmp_path / "saved.yaml").write_text(yaml.safe_dump(saved))
    again = load_recipe(tmp_path / "saved.yaml")
    assert dataclasses.asdict(again) == {
        **dataclasses.asdict(recipe),
        "data": dataclasses.asdict(again.data),
        "output_dir": "out",
    }


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipe_loads(path: Path):
    assert load_recipe(path).name == path.stem
