"""Recipes of real pairs: tiny models of the same classes run them."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from tests.test_pairs import TEXT, byte_level, wordpiece
from training.recipes.recipe import REPOSITORY
from training.records.record import read_json
from training.run import main as run

PAIRS = ("llama_3_2_1b", "qwen3_0_6b", "smollm2_135m_minilm")
RECIPES = REPOSITORY / "configuration" / "recipes"


def tiny_pair(recipe: dict[str, Any], folder: Path) -> None:
    """Put tiny models of the same classes in the place of the pretrained ones."""
    encoders = {stage.get("from", {}).get("encoder") for stage in recipe["stages"]}
    for name, source in recipe["pretrained"].items():
        is_encoder = name in encoders
        tokenizer = wordpiece() if source["config"]["model_type"] == "bert" else byte_level()
        vocab_size = 300 if tokenizer is byte_level() else len(wordpiece())
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 6, "num_attention_heads": 2}
        config = {**source["config"], **sizes, "vocab_size": vocab_size}
        config |= {key: 2 for key in ("num_key_value_heads",) if key in config}
        config |= {key: 8 for key in ("head_dim",) if key in config}
        source["config"], source["path"] = config, str(folder / name)
        made = AutoConfig.for_model(**config)
        (AutoModel if is_encoder else AutoModelForCausalLM).from_config(made).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        if not is_encoder:
            recipe["tokenizer"]["path"] = str(folder / name)


@pytest.mark.parametrize("name", PAIRS)
def test_tiny_models_of_the_same_classes_take_a_step(name: str, tmp_path: Path):
    recipe = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    tiny_pair(recipe, tmp_path)
    recipe |= {"output_dir": str(tmp_path / "out"), "use_cpu": True}
    for number, split in enumerate(("train", "validation", "test")):
        (tmp_path / f"{split}.txt").write_text(f"{number}. " + TEXT.replace("old", f"o{number}d") * 60, "utf-8")
        recipe["data"][split] = [str(tmp_path / f"{split}.txt")]
    for stage in recipe["stages"]:
        stage["training"].update(max_steps=1, batch_size=2)
        for part in ("encoder", "decoder"):
            if part in stage.get("model", {}):
                stage["model"][part] |= {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    recipe["evaluation"].update(num_rows=2, batch_size=2)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe), "utf-8")
    assert run([str(tmp_path / "recipe.yaml")]) == 0
    record = read_json(tmp_path / "out" / "record.json")
    assert record["hub"]["verified"] and any(key.startswith("clm") for key in record["metrics"])
