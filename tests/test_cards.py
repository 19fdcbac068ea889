"""Cards say what the record says, in metadata that the Hub's client reads, with a snippet that runs."""

import json
import re

import pytest
from huggingface_hub import ModelCard
from transformers import LlamaForCausalLM

from modeling_memory import MaskedMixerForCausalLM, MemoryAutoencoder, MemoryAutoencoderConfig, MemoryProcessor
from tests.conftest import build_tiny_tokenizer, tiny_decoder_config, tiny_encoder_config
from tests.memory_models import CHUNK, WINDOW, build_model
from tests.processes import run_snippet
from tests.records import RECORD
from training.places import REPOSITORY
from training.publishing.cards import (
    SECTIONS,
    check_card,
    copied_length,
    project_address,
    render_card,
    result_table,
    stage_record,
)
from training.publishing.hub_folder import write_hub_folder
from training.publishing.provenance import recorded_bases, training_sources
from training.records.record import read_json

MODELS = ("memory", "autoencoder", "mixer", "decoder")


def build(kind):
    """A tiny model of a kind and what is saved beside it."""
    tokenizer = build_tiny_tokenizer()
    if kind == "memory":
        return build_model(), MemoryProcessor(tokenizer, chunk_length=CHUNK, window_length=WINDOW)
    if kind == "autoencoder":
        body = tiny_encoder_config()
        config = MemoryAutoencoderConfig(encoder=body, decoder=body, chunk_length=CHUNK)
        return MemoryAutoencoder(config).eval(), tokenizer
    if kind == "mixer":
        return MaskedMixerForCausalLM(tiny_encoder_config()).eval(), tokenizer
    return LlamaForCausalLM(tiny_decoder_config()).eval(), tokenizer


@pytest.fixture(scope="module")
def model():
    return build("memory")[0]


def test_metadata_and_numbers_are_those_of_the_record(model):
    card = ModelCard(str(render_card(model, RECORD)))
    data = card.data
    assert (data.library_name, data.license, data.language) == ("transformers", "apache-2.0", "en")
    assert data.pipeline_tag == "text-generation" and data.model_name == "tiny" and "custom_code" in data.tags
    assert [result.metric_value for result in data.eval_results] == [0.9512]
    for said in (
        "| test split | 95.12 ±1.12 |",
        "| test split, no memories | 3.12 |",
        "Nats for a next token: test split 3.000; test split, a model trained without memories 3.200.",
        "Reproduce: `python -m training.run tiny.yaml` at commit `abc`.",
        "- books, editions of Standard Ebooks (public domain, CC0 1.0): https://",
        "A memory is the text",
    ):
        assert said in card.text
    assert "3d0c" not in str(card) and "some CPU" not in str(card), "checksums and hardware are the record's"


def test_the_metadata_names_each_dataset_once(model):
    """One result of one dataset, with a metric for each way of asking, as the Hub shows them."""
    copy = {"token_accuracy": 0.99, "generated_token_accuracy": 0.9, "exact_match": 0.5, "num_generated_rows": 32}
    record = {**RECORD, "metrics": {**RECORD["metrics"], "copy": {"memory": copy}}}
    metadata = str(render_card(model, record)).split("---")[1]
    assert metadata.count("Standard Ebooks") == 1 == metadata.count("dataset:")
    for name in ("copy: token accuracy, teacher-forced", "copy: token accuracy, free-running", "copy: exact match"):
        assert name in metadata


@pytest.mark.parametrize("record", [None, RECORD], ids=["no record", "record"])
@pytest.mark.parametrize("kind", MODELS)
def test_every_card_has_all_sections_and_no_holes(kind, record):
    card = render_card(build(kind)[0], record)
    headings = re.findall(r"^## (.+)$", card.text, re.MULTILINE)
    assert headings == list(SECTIONS)
    assert "More Information Needed" not in card.text and "{{" not in card.text and "\n\n\n" not in card.text
    for heading, body in zip(headings, re.split(r"^## .+$", card.text, flags=re.MULTILINE)[1:], strict=True):
        assert body.strip(), heading


def test_a_card_without_a_record_claims_nothing(model):
    card = render_card(model)
    assert "nothing is claimed" in card.text and "%" not in card.text.partition("## Results")[2]
    assert card.data.eval_results is None


def test_limits_are_measured_or_said_not_to_be(model):
    assert "was not measured; nothing is claimed" in render_card(model, RECORD).text
    copy = {"token_accuracy": 0.123, "generated_token_accuracy": 0.045, "exact_match": 0.25, "num_generated_rows": 8}
    suites = {
        "blank_copy": {"memory": {"token_accuracy": 0.9, "token_accuracy_interval": [0.8, 0.95]}},
        "copy": {"memory": copy, "no_memory": {"token_accuracy": 0.77}},
    }
    card = render_card(model, {**RECORD, "domains": {"digits": {"description": "random digits", "metrics": suites}}})
    assert "| random digits | 12.30 | 4.50 | 2 of 8 |" in card.text
    for left_out in ("nothing is claimed", "77.00", "90.00", "95.12"):  # controls, and what is asked all at once
        assert left_out not in card.text, f"{left_out} is in the record"
    assert len(card.data.eval_results) == 1  # other text is no result of the training text's test split


def test_tokens_that_never_come_back_are_named(model):
    assert "never came back" not in render_card(model, RECORD).text
    lost = {"description": "all", "metrics": {}, "lost_tokens": ['"', "`", "Ð"], "tries": 4, "num_tokens": 2043}
    card = " ".join(render_card(model, {**RECORD, "domains": {"every_token": lost}}).text.split())
    assert "3 of the 2,043 tokens of its vocabulary never came back in 4 tries" in card
    assert '`"` `` ` `` and more' in card


def test_the_card_takes_what_only_its_writer_knows(model):
    context = {
        "description": "A first one.",
        "training_data": [
            {"name": "tales", "licence": "CC0 1.0", "license": "cc0-1.0", "source": "here", "hub": "me/t"}
        ],
        "base_models": ["me/decoder"],
        "licence": "house=https://example.org/house",
        "language": ["de", "en"],
        "project": "https://example.org/project",
    }
    card = ModelCard(str(render_card(model, RECORD, context)))
    assert "- tales (CC0 1.0): here" in card.text and "Standard Ebooks" not in card.text
    assert card.data.base_model == ["me/decoder"] and card.data.datasets == ["me/t"]
    assert (card.data.license, card.data.license_name, card.data.license_link) == (
        "other",
        "house",
        "https://example.org/house",
    )
    assert card.data.language == ["de", "en"] and "(https://example.org/project)" in card.text
    assert "A first one." in card.text and "Made from me/decoder." in card.text
    with pytest.raises(ValueError, match="does not know colour"):
        render_card(model, RECORD, {"colour": "blue"})


def test_what_a_writer_said_is_kept_in_the_record_and_said_again(model, tmp_path):
    processor = build("memory")[1]
    folder = write_hub_folder(model, processor, tmp_path / "hub", RECORD, {"model_name": "me/x", "language": ["de"]})
    record = read_json(folder / "record.json")
    assert record["card"] == {"model_name": "me/x", "language": ["de"]}
    again = write_hub_folder(model, processor, tmp_path / "again", record)
    assert (again / "README.md").read_text() == (folder / "README.md").read_text()
    assert read_json(again / "record.json") == record


def test_every_card_has_the_projects_address():
    """One place: pyproject.toml, where it has one."""
    for kind in MODELS:
        assert f"[modeling-memory]({project_address()})" in render_card(build(kind)[0]).text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("license: apache-2.0\n", ""), "lacks license"),
        (lambda text: text.replace("pipeline_tag: text-generation", "pipeline_tag: magic"), "'magic'"),
        (lambda text: text.replace("value: 0.9512", "value: .nan"), "token_accuracy is nan"),
        (lambda text: text.replace("## Limits", "## Else"), "no section Limits"),
        (lambda text: text + "{{ left }}", "still holds '{{'"),
        (lambda text: text.replace("license: apache-2.0", "license: apache-2.0\nbase_model: a//b"), "a//b"),
    ],
)
def test_a_card_that_the_hub_would_not_take_is_refused(model, change, message):
    card = render_card(model, RECORD)
    check_card(card)
    with pytest.raises(ValueError, match=message):
        check_card(ModelCard(change(str(card))))


@pytest.mark.parametrize("name", sorted(path.name for path in (REPOSITORY / "training" / "corpora").iterdir()))
def test_the_card_knows_all_text_that_ships(name):
    readme = (REPOSITORY / "training" / "corpora" / name / "README.md").read_text("utf-8")
    for path in (f"training/corpora/{name}/train.parquet", f"../data/{name}_train-00000-of-00004.parquet"):
        (source,) = training_sources({"recipe": {"data": {"train": [path]}}})
        assert source["source"] in readme and source["licence"].split()[0] in readme.replace("Creative Commons", "CC")


def test_datasets_of_the_hub_are_named_in_the_metadata(model):
    train = ["hub:allenai/c4@1588ec4:en:train", "hub:allenai/c4@1588ec4:de:train", "data/tinystories_train.parquet"]
    card = ModelCard(str(render_card(model, {**RECORD, "recipe": {**RECORD["recipe"], "data": {"train": train}}})))
    assert card.data.datasets == ["allenai/c4", "roneneldan/TinyStories"]
    assert "- allenai/c4 (odc-by): https://huggingface.co/datasets/allenai/c4 at 1588ec4" in card.text


def test_files_tell_what_a_glob_pattern_hides():
    record = {
        "recipe": {"data": {"train": ["training/corpora/*/train.parquet", "mine/train.parquet"]}},
        "inputs": {
            "files": {"train": {"books/train.parquet": "1", "wikinews/train.parquet": "2", "mine/train.parquet": "3"}}
        },
    }
    names = [source["name"].split(",")[0] for source in training_sources(record)]
    assert names == ["train.parquet", "books", "English Wikinews"]


def test_a_record_of_a_real_run_names_its_text():
    """The paths and names of a record that a run wrote, not of one made up for a test."""
    record = read_json(REPOSITORY / "benchmarks" / "results" / "quickstart.json")
    assert [source["name"] for source in training_sources(record)] == ["books, editions of Standard Ebooks"]
    for stage in record["stages"]:
        card = render_card(build("memory")[0], stage_record(record, stage))
        assert not re.search(r"[0-9a-f]{40}", str(card)), "checksums are the record's"
        assert card.data.eval_results and card.data.language == "en", stage


def test_a_stage_has_its_own_numbers_and_those_of_nobody_else():
    cut = stage_record(RECORD, "autoencoder")
    assert cut["metrics"] == {"retention": RECORD["metrics"]["autoencoder"]}
    assert list(cut["stages"]) == ["autoencoder"] and cut["sample"] is None
    cut = stage_record(RECORD, "decoder")
    assert cut["metrics"] == {"causal": {"validation_split": {"loss": 3.5}}}
    assert list(cut["stages"]) == ["autoencoder", "decoder"]
    cut = stage_record(RECORD, "no_memory")
    assert cut["metrics"] == {"clm": {"this_model": RECORD["metrics"]["clm"]["no_memory_model"]}}
    cut = stage_record(RECORD, "copy")
    assert cut["metrics"] == RECORD["metrics"] and cut["sample"] == RECORD["sample"] and len(cut["stages"]) == 3
    with pytest.raises(ValueError, match="no stage 'magic'; it has autoencoder, decoder, copy, no_memory"):
        stage_record(RECORD, "magic")
    card = render_card(build("decoder")[0], stage_record(RECORD, "decoder"))
    assert "Nats for a next token: validation split 3.500." in card.text and "95.12" not in card.text


def test_a_stage_on_a_pretrained_model_is_cut_out_with_it():
    pretrained = {"llama": {"path": "meta-llama/Llama-3.2-1B"}, "unused": {"path": "me/unused"}}
    stages = [
        *RECORD["recipe"]["stages"][:2],
        {"name": "copy", "from": {"encoder": "autoencoder", "decoder": "llama"}},
    ]
    record = {**RECORD, "recipe": {**RECORD["recipe"], "pretrained": pretrained, "stages": stages}}
    assert recorded_bases(stage_record(record, "copy")) == ["meta-llama/Llama-3.2-1B"]
    assert recorded_bases(stage_record(record, "decoder")) == []


def test_the_table_leaves_out_what_is_no_metric():
    assert list(result_table(RECORD)) == ["test split", "test split, no memories"]


@pytest.mark.parametrize("kind", MODELS)
def test_the_snippet_runs_as_it_stands(kind, tmp_path):
    """In an empty process beside the folder, which has the name that the card gives it."""
    model, processor = build(kind)
    folder = write_hub_folder(model, processor, tmp_path / "me" / "tiny", None, {"model_name": "me/tiny"})
    done = run_snippet(ModelCard.load(folder / "README.md").text, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_the_card_asks_for_the_versions_that_the_package_asks_for(model):
    project = (REPOSITORY / "pyproject.toml").read_text("utf-8")
    needed = project.partition("dependencies = [")[2].partition("]")[0]
    asked = re.findall(r'"((?:torch|transformers)>=[^"]+)"', needed)
    assert len(asked) == 2
    assert "pip install " + " ".join(f'"{requirement}"' for requirement in asked) in render_card(model).text


def test_a_second_card_is_the_same(model):
    assert str(render_card(model, RECORD)) == str(render_card(model, json.loads(json.dumps(RECORD))))


def test_a_stage_on_short_sources_keeps_what_an_earlier_one_learnt_of_long_ones():
    data = {"row_length": 640, "source_length": 512, "shortened": 0.3}
    long = {"name": "copy", "objectives": {"copy": 1.0}, "data": data}
    short = {**long, "name": "ends", "from": {"model": "copy"}, "data": {**data, "source_length": 128}}
    record = {"published_stage": "ends", "recipe": {"stages": [long, short]}}
    assert copied_length(record) == {"tokens": 512, "lengths": "any"}
    assert copied_length({**record, "published_stage": "copy"}) == {"tokens": 512, "lengths": "any"}
    short["data"]["shortened"] = 0.0
    assert copied_length(record) == {"tokens": 128, "lengths": "exactly"}


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"vary_source": True}, "learnt to give back texts of whole windows up to 64 tokens"),
        ({"vary_source": False}, "learnt to give back texts of exactly 64 tokens"),
        ({"shortened": 0.3}, "learnt to give back texts of up to 64 tokens; longer ones"),
    ],
)
def test_a_card_says_which_lengths_were_trained(data, said):
    stage = {"name": "copy", "objectives": {"copy": 1.0}, "data": {"row_length": 64, **data}}
    record = {"published_stage": "copy", "recipe": {"stages": [stage], "evaluation": {}}}
    assert said in " ".join(render_card(build("memory")[0], record).text.split())
    assert "learnt to give back texts" not in render_card(build("memory")[0]).text


@pytest.mark.parametrize("folder", sorted((REPOSITORY / "model_cards").glob("starter-*")), ids=lambda path: path.name)
def test_a_page_is_short_and_tells_how_to_make_it_again_in_one_line(folder):
    text = ModelCard.load(folder / "README.md").text
    assert len(text.split()) <= 590 and len(text.splitlines()) < 90
    (line,) = [line for line in text.splitlines() if line.startswith("Reproduce: ")]
    assert "`python -m training.run " in line and " at commit `" in line
