"""Hub folders: what is in them, that nothing else is, and that a clean process gets the same bits out of them."""

import ast
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import CLIPTextConfig, CLIPTextModel, LlamaForCausalLM
from transformers.dynamic_module_utils import get_relative_imports

from modeling_memory import MaskedMixerForCausalLM, MemoryAutoencoder, MemoryAutoencoderConfig, MemoryProcessor
from tests.conftest import build_tiny_encoder_tokenizer, build_tiny_tokenizer, tiny_decoder_config, tiny_encoder_config
from tests.memory_models import CHUNK, WINDOW, build_model
from tests.records import RECORD
from training import domains, publish
from training.publishing import hub_folder
from training.publishing.hub_folder import PublishError, check_files, load_checkpoint, write_hub_folder
from training.publishing.verification import verify_hub_folder

PACKAGE = hub_folder.REPOSITORY / "modeling_memory"
HUB_FILES = sorted(path for path in PACKAGE.glob("*.py") if path.name != "__init__.py")


@pytest.fixture(scope="module")
def model():
    return build_model()


@pytest.fixture(scope="module")
def processor():
    return MemoryProcessor(build_tiny_tokenizer(), chunk_length=CHUNK, window_length=WINDOW)


@pytest.fixture
def folder(model, processor, tmp_path):
    return write_hub_folder(model, processor, tmp_path / "hub", RECORD)


def files_of(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("path", HUB_FILES, ids=lambda path: path.stem)
def test_hub_files_import_only_what_every_user_has(path):
    """The library finds imports by pattern, docstrings included; flat single-dot imports are all that survive."""
    tree = ast.parse(path.read_text("utf-8"))
    relative = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 1 and node.module and "." not in node.module, ast.unparse(node)
            assert (PACKAGE / f"{node.module}.py").exists()
            relative.add(node.module)
            continue
        else:
            continue
        for name in names:
            root = name.partition(".")[0]
            assert root in {"torch", "transformers", "safetensors"} | sys.stdlib_module_names, name
    assert set(get_relative_imports(path)) == relative


def imported_at_once(path: Path) -> set[str]:
    """Files of the package that importing a file runs, by its imports outside functions, theirs included."""
    found: set[str] = set()
    waiting = [path.stem]
    while waiting:
        tree = ast.parse((PACKAGE / f"{waiting.pop()}.py").read_text("utf-8"))
        own = {node.module for node in tree.body if isinstance(node, ast.ImportFrom) and node.level == 1}
        waiting += own - found
        found |= {str(name) for name in own}
    return found


@pytest.mark.parametrize("auto_map", hub_folder.AUTO_MAPS.values(), ids=hub_folder.AUTO_MAPS)
def test_entry_files_name_all_files_that_they_need(auto_map):
    """Before 5.8 the library copies from a local folder what the entry's own file imports, and nothing after it."""
    for entry in {**auto_map, **hub_folder.PROCESSOR_AUTO_MAP}.values():
        path = PACKAGE / f"{entry.partition('.')[0]}.py"
        assert imported_at_once(path) <= set(get_relative_imports(path)), path.name


@pytest.mark.parametrize("auto_map", hub_folder.AUTO_MAPS.values(), ids=hub_folder.AUTO_MAPS)
def test_auto_maps_name_classes_that_exist(auto_map):
    for entry in {**auto_map, **hub_folder.PROCESSOR_AUTO_MAP}.values():
        file, _, name = entry.partition(".")
        tree = ast.parse((PACKAGE / f"{file}.py").read_text("utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.ClassDef)}


def test_the_folder_holds_all_that_loading_needs_and_nothing_else(folder):
    files = files_of(folder)
    assert {
        "README.md",
        "LICENSE",
        "record.json",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "modeling_memory.py",
        "configuration_memory.py",
        "processing_memory.py",
    } <= files
    assert not any(name.endswith((".bin", ".pt", ".pyc")) or "training" in name for name in files)
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"] == hub_folder.AUTO_MAPS["memory_encoder_decoder"]
    settings = json.loads((folder / "processor_config.json").read_text())
    assert settings["auto_map"] == {"AutoProcessor": "processing_memory.MemoryProcessor"}


def test_no_place_of_this_machine_is_published(model, processor, tmp_path):
    """Parts that were loaded from folders carry those folders' names in their configs."""
    parts = tmp_path / "parts"
    LlamaForCausalLM(tiny_decoder_config()).save_pretrained(parts / "decoder")
    LlamaForCausalLM(tiny_decoder_config()).save_pretrained(parts / "encoder")
    joined = type(model).from_encoder_decoder_pretrained(
        str(parts / "encoder"), str(parts / "decoder"), chunk_length=CHUNK, window_length=WINDOW, memory_token_id=96
    )
    joined.config.decoder._name_or_path = str(parts / "decoder")
    processor.save_pretrained(parts)
    loaded = MemoryProcessor.from_pretrained(parts)
    record = {**RECORD, "places": [f"{hub_folder.REPOSITORY}/configuration/x.yaml", f"saved to {parts}/decoder."]}
    record["run"] = {**RECORD["run"], "command": f"python {hub_folder.REPOSITORY}/training/run.py"}
    folder = write_hub_folder(joined, loaded, tmp_path / "hub", record)
    for name in files_of(folder):
        content = (folder / name).read_bytes()
        for place in (tmp_path, hub_folder.REPOSITORY):
            assert str(place).encode() not in content, name
    saved = json.loads((folder / "record.json").read_text())
    assert saved["places"][0] == "configuration/x.yaml"
    assert saved["run"]["command"] == "python training/run.py"


def test_the_model_and_the_record_are_left_as_they_were(model, processor, tmp_path):
    record = json.loads(json.dumps(RECORD))
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = {**model.config.to_dict(), "auto_map": None}
    write_hub_folder(model.train(), processor, tmp_path / "hub", record)
    assert model.training
    model.eval()
    assert record == RECORD
    assert {**model.config.to_dict(), "auto_map": None} == before
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_nothing_of_an_earlier_folder_stays(model, processor, tmp_path, monkeypatch):
    """Written over, an old single file would win over new shards and serve old weights."""
    target = tmp_path / "hub"
    old = build_model()
    with torch.no_grad():
        for parameter in old.parameters():
            parameter.add_(1.0)
    write_hub_folder(old, processor, target, RECORD)
    monkeypatch.setattr(hub_folder, "MAX_SHARD_SIZE", "40KB")
    write_hub_folder(model, processor, target)
    files = files_of(target)
    assert "model.safetensors" not in files and "model.safetensors.index.json" in files
    assert "record.json" not in files
    loaded, again = load_checkpoint(target)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    assert again.chunk_length == CHUNK
    assert [path.name for path in tmp_path.iterdir()] == ["hub"]


@pytest.mark.parametrize("name", ["notes.txt", "optimizer.pt", "sub/config.json", "mine.py"])
def test_a_place_that_holds_something_else_is_not_overwritten(model, processor, tmp_path, name):
    (tmp_path / "hub" / name).parent.mkdir(parents=True)
    (tmp_path / "hub" / name).write_text("mine")
    if name.endswith(".py"):  # beside a config, as in a folder of somebody's own
        (tmp_path / "hub" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="something else than a Hub folder"):
        write_hub_folder(model, processor, tmp_path / "hub")
    assert (tmp_path / "hub" / name).read_text() == "mine"


def test_a_failed_write_leaves_the_earlier_folder(model, processor, folder, monkeypatch):
    before = {name: (folder / name).read_bytes() for name in files_of(folder)}

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(hub_folder, "render_card", fail)
    with pytest.raises(OSError, match="disk full"):
        write_hub_folder(model, processor, folder)
    assert {name: (folder / name).read_bytes() for name in files_of(folder)} == before
    assert [path.name for path in folder.parent.iterdir()] == ["hub"]


def test_weights_of_two_dtypes_are_refused(processor, tmp_path):
    mixed = build_model()
    mixed.encoder.half()
    with pytest.raises(ValueError, match=r"several dtypes \(float16, float32\)"):
        write_hub_folder(mixed, processor, tmp_path / "hub")


def test_other_models_and_missing_processors_are_refused(model, tmp_path):
    with pytest.raises(ValueError, match="type 'clip_text_model'"):
        write_hub_folder(CLIPTextModel(CLIPTextConfig(hidden_size=8, num_attention_heads=2)), None, tmp_path / "hub")
    with pytest.raises(ValueError, match="expected a MemoryProcessor"):
        write_hub_folder(model, build_tiny_tokenizer(), tmp_path / "hub")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "notes.txt").write_text("x"), "notes.txt must not be published"),
        (lambda folder: (folder / "modeling_memory.py").unlink(), "loading needs modeling_memory.py"),
        (lambda folder: (folder / "generation_memory.py").unlink(), "loading needs generation_memory.py"),
        (lambda folder: (folder / "stray.py").write_text(""), "stray.py must not be published: no entry"),
        (lambda folder: (folder / "gone.py").symlink_to("nowhere.py"), "gone.py must not be published"),
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text("{}"),
            "both model.safetensors and shards",
        ),
        (lambda folder: (folder / "record.json").write_text(f'"{folder.parent}/x"'), "a place on this machine"),
    ],
)
def test_check_files_finds_what_must_not_be_published(folder, change, message):
    check_files(folder)
    change(folder)
    with pytest.raises(PublishError, match=message):
        check_files(folder)


def test_a_memory_model_loads_in_a_clean_process_bit_for_bit(model, processor, folder):
    report = verify_hub_folder(folder, model)
    assert set(report) == {"folder", "hub"}
    for result in report.values():
        assert result["module"].startswith("transformers_modules.")
        assert result["loaded"] == [
            "AutoConfig",
            "AutoModel",
            "AutoModelForCausalLM",
            "AutoProcessor",
            "AutoTokenizer",
        ]
        assert result["cases"] == ["plain", "processor"]
    assert ".me." in report["hub"]["module"]


def test_two_tokenizers_load_in_a_clean_process(tmp_path):
    model = build_model("bert", "gpt_neox", self_memory=False, memories_per_chunk=2)
    processor = MemoryProcessor(
        build_tiny_tokenizer(),
        build_tiny_encoder_tokenizer(),
        chunk_length=CHUNK,
        window_length=WINDOW,
        memories_per_chunk=2,
    )
    folder = write_hub_folder(model, processor, tmp_path / "hub")
    assert "encoder_tokenizer/tokenizer.json" in files_of(folder)
    report = verify_hub_folder(folder, model)
    assert report["hub"]["cases"] == ["plain", "processor"]


def test_an_autoencoder_loads_in_a_clean_process(tmp_path):
    torch.manual_seed(0)
    config = MemoryAutoencoderConfig(
        encoder=tiny_encoder_config(), decoder=tiny_encoder_config(), chunk_length=CHUNK, memories_per_chunk=2
    )
    model = MemoryAutoencoder(config).eval()
    folder = write_hub_folder(model, build_tiny_tokenizer(), tmp_path / "hub")
    report = verify_hub_folder(folder, model)
    assert report["folder"]["loaded"] == ["AutoConfig", "AutoModel", "AutoTokenizer"]


def test_a_decoder_of_the_library_loads_in_a_clean_process_without_code_of_ours(tmp_path):
    """The card, record and tokenizer of a stage that is an ordinary language model."""
    model = LlamaForCausalLM(tiny_decoder_config()).eval()
    folder = write_hub_folder(model, build_tiny_tokenizer(), tmp_path / "hub", RECORD)
    assert not list(folder.glob("*.py")) and "auto_map" not in (folder / "config.json").read_text()
    report = verify_hub_folder(folder, model)
    assert report["hub"]["loaded"] == ["AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer"]


@pytest.mark.slow
def test_a_masked_mixer_loads_in_a_clean_process(tmp_path):
    model = MaskedMixerForCausalLM(tiny_encoder_config()).eval()
    folder = write_hub_folder(model, None, tmp_path / "hub")
    assert verify_hub_folder(folder, model)["hub"]["loaded"] == ["AutoConfig", "AutoModel", "AutoModelForCausalLM"]


def test_other_weights_than_the_writers_are_found(model, folder):
    other = build_model()
    with torch.no_grad():
        other.decoder.lm_head.weight[7, 0] += 1e-3
    with pytest.raises(PublishError, match="logits differ from those of the writer"):
        verify_hub_folder(folder, other)


def test_the_command_publishes_and_verifies_a_checkpoint(model, processor, tmp_path, capsys, monkeypatch):
    """Also with what a training checkpoint has beside the model, none of which is published."""
    verified = []

    def verify(folder: Path, model: object, **bases: object) -> dict:  # the real one runs in the tests above
        verified.append((folder, type(model).__name__))
        return {"hub": {"loaded": ["AutoModel"]}}

    monkeypatch.setattr(publish, "verify_hub_folder", verify)
    checkpoint = tmp_path / "checkpoint"
    model.save_pretrained(checkpoint)
    processor.save_pretrained(checkpoint)
    (checkpoint / "optimizer.pt").write_bytes(b"state")
    (checkpoint / "record.json").write_text(json.dumps(RECORD))
    arguments = [str(checkpoint), "--to", str(tmp_path / "hub"), "--name", "me/tiny"]
    assert publish.main(arguments) == 0
    assert verified == [(tmp_path / "hub", "MemoryEncoderDecoderForCausalLM")]
    assert "loads bit for bit" in capsys.readouterr().out
    assert "optimizer.pt" not in files_of(tmp_path / "hub")
    assert ModelCard.load(tmp_path / "hub" / "README.md").data.model_name == "me/tiny"


def test_the_command_publishes_rounded_weights_and_says_so(model, processor, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model.save_pretrained("checkpoint")
    processor.save_pretrained("checkpoint")
    Path("record.json").write_text(json.dumps(RECORD))
    command = ["checkpoint", "--record", "record.json", "--to", "half", "--dtype", "bfloat16"]
    assert publish.main(command) == 0
    whole, half = (Path(name, "model.safetensors").stat().st_size for name in ("checkpoint", "half"))
    assert half < 0.6 * whole
    loaded = load_checkpoint("half")[0]
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    rounded = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    assert all(torch.equal(tensor, rounded[name]) for name, tensor in loaded.state_dict().items())
    assert "before rounding to bfloat16" in Path("half", "README.md").read_text()
    assert (
        publish.main(["checkpoint", "--to", "other", "--dtype", "bfloat16", "--by-reference", "--base", "decoder=a/b"])
        == 2
    )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "is no valid JSON"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "clip"}'), "type 'clip'"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no model.safetensors"),
        (lambda folder: (folder / "record.json").write_text("{"), "record.json is no valid JSON"),
        (lambda folder: (folder / "processor_config.json").unlink(), "expected a MemoryProcessor"),
    ],
)
def test_the_command_names_a_users_mistake_in_one_line(folder, tmp_path, capsys, damage, message):
    damage(folder)
    assert publish.main([str(folder), "--to", str(tmp_path / "other")]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error
    assert not (tmp_path / "other").exists()


def test_the_command_publishes_a_stage_with_its_own_numbers_and_tokenizer(tmp_path, monkeypatch):
    """From the folder of a run: the record stands three folders up, and is cut to the stage."""
    monkeypatch.setattr(
        publish, "verify_hub_folder", lambda folder, model, **bases: {"hub": {"loaded": ["AutoModel"]}}
    )
    run = tmp_path / "run"
    checkpoint = run / "stages" / "decoder" / "model"
    LlamaForCausalLM(tiny_decoder_config()).save_pretrained(checkpoint)
    build_tiny_tokenizer().save_pretrained(checkpoint)
    (run / "record.json").write_text(json.dumps(RECORD))
    domains = tmp_path / "domains.json"
    score = {"token_accuracy": 0.123, "loss": 4.5, "num_tokens": 5}
    measured = {"digits": {"description": "random digits", "metrics": {"clm": {"this_model": score}}}}
    domains.write_text(json.dumps({"domains": measured}))
    hub = tmp_path / "hub"
    assert publish.main([str(checkpoint), "--to", str(hub), "--domains", str(domains)]) == 0
    card = ModelCard.load(hub / "README.md").text
    assert "validation split 3.500" in card and "95.12" not in card
    assert "random digits 4.500" in card
    assert "tokenizer.json" in files_of(hub)
    assert json.loads((hub / "record.json").read_text())["published_stage"] == "decoder"


def test_the_command_names_missing_shards_and_folders(model, processor, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(hub_folder, "MAX_SHARD_SIZE", "40KB")
    folder = write_hub_folder(model, processor, tmp_path / "hub")
    sorted(folder.glob("model-*.safetensors"))[0].unlink()
    assert publish.main([str(folder), "--to", str(tmp_path / "other")]) == 2
    assert "lacks model-00001-of-" in capsys.readouterr().err
    assert publish.main([str(tmp_path / "nowhere"), "--to", str(tmp_path / "other")]) == 2
    assert "nowhere is no folder" in capsys.readouterr().err
    assert publish.main([str(folder), "--to", str(tmp_path / "other"), "--record", "none.json"]) == 2
    assert "none.json is no file" in capsys.readouterr().err


def test_code_is_what_the_entries_import_and_nothing_else(folder):
    """Followed here by hand, from the files as they are."""
    config, settings = (json.loads((folder / f"{name}config.json").read_text()) for name in ("", "processor_"))
    auto_map = {**config["auto_map"], **settings["auto_map"]}
    needed = [f"{entry.partition('.')[0]}.py" for entry in auto_map.values()]
    for name in needed:  # grows while it is read
        for node in ast.walk(ast.parse((PACKAGE / name).read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level == 1 and f"{node.module}.py" not in needed:
                needed.append(f"{node.module}.py")
    assert (
        hub_folder.code_files(auto_map) == set(needed) == {name for name in files_of(folder) if name.endswith(".py")}
    )
    assert not any(path.is_symlink() for path in folder.iterdir())


def test_a_refreshed_folder_has_new_card_and_code_and_the_same_weights(folder, capsys, monkeypatch):
    monkeypatch.setattr(publish, "verify_hub_folder", lambda *_, **__: {"hub": {"loaded": ["AutoModel"]}})
    before = {name: (folder / name).read_bytes() for name in files_of(folder)}
    (folder / "README.md").write_text("old")
    (folder / "modeling_memory.py").write_text("old")
    (folder / "generation_memory.py").unlink()
    assert publish.main([str(folder), "--refresh"]) == 0, capsys.readouterr().err
    assert {name: (folder / name).read_bytes() for name in files_of(folder)} == before
    assert publish.main([str(folder), "--refresh", "--language", "de", "--name", "me/x"]) == 0
    data = ModelCard.load(folder / "README.md").data
    assert (data.language, data.model_name) == ("de", "me/x")
    assert publish.main([str(folder), "--refresh"]) == 0  # what was said once is kept
    assert ModelCard.load(folder / "README.md").data.model_name == "me/x"
    assert (folder / "model.safetensors").read_bytes() == before["model.safetensors"]
    assert publish.main([str(folder), "--refresh", "--dtype", "bfloat16"]) == 2
    assert "--dtype rounds all weights" in capsys.readouterr().err


def test_help_and_missing_arguments():
    command = [sys.executable, "-m", "training.publish"]
    help_text = subprocess.run(
        [*command, "--help"], capture_output=True, text=True, cwd=hub_folder.REPOSITORY, check=True
    )
    assert "--to FOLDER" in help_text.stdout


def commands_of(page: str) -> list[tuple[list[str], bool]]:
    """The commands of a page's blocks, split into words, and whether each needs an account of the Hub."""
    found = []
    for before, block in re.findall(r"(.*?)^```bash\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        before = re.sub(r"<!-- not run: .*? -->\s*$", "", before)  # why the block runs nowhere
        needs_account = "*Hub account*" in before.strip().rpartition("\n\n")[2]
        lines = block.replace("\\\n", " ").strip().splitlines()
        found += [(shlex.split(line, comments=True), needs_account) for line in lines]
    return found


def test_the_pages_commands_run_as_they_stand(tmp_path, monkeypatch, capsys):
    """Those for the Hub are read by the command line only; the clean processes run in other tests."""
    monkeypatch.setattr(publish, "verify_hub_folder", lambda *_, **__: {"hub": {"loaded": ["AutoModel"]}})
    for name in ("model_cards", "training"):
        (tmp_path / name).symlink_to(hub_folder.REPOSITORY / name)
    monkeypatch.chdir(tmp_path)
    commands = commands_of((hub_folder.REPOSITORY / "docs" / "publishing.md").read_text("utf-8"))
    for words, needs_account in commands:
        assert words[:2] == ["python", "-m"], words
        command = {"training.publish": publish, "training.domains": domains}[words[2]]
        if needs_account:
            command.build_parser().parse_args(words[3:])
        else:
            assert command.main(words[3:]) == 0, (words, capsys.readouterr().err)
    assert {needs_account for _, needs_account in commands} == {True, False}
    card = ModelCard.load(tmp_path / "runs" / "my-model" / "README.md")
    assert card.data.language == "en" and "| news | " in card.text


def test_the_commands_in_the_docstring_can_be_read():
    for words, _ in commands_of(publish.__doc__ or ""):
        publish.build_parser().parse_args(words[3:])
