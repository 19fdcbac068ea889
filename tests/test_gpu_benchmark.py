"""The benchmark of one GPU in toy sizes: every part runs, what travels arrives, what comes back fits."""

import json
import shutil
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import bundle
from benchmarks.gpu.__main__ import SHARD_BYTES, SHIP_BYTES, SHIP_FILES, main, ship
from benchmarks.gpu.bundle import commands, read_tokens, receive, squeeze, write_calls
from benchmarks.gpu.job import Job, OutOfTimeError, alarm
from benchmarks.gpu.parts import PARTS
from modeling_memory import MemoryEncoderDecoderForCausalLM
from tests.test_smollm2 import SPECIALS, site  # noqa: F401
from training.places import REPOSITORY
from training.records.record import read_json, write_json

CORPORA = REPOSITORY / "training" / "corpora"


@pytest.fixture(scope="module")
def packed(site: Path, tmp_path_factory: pytest.TempPathFactory):  # noqa: F811
    """A bundle in toy sizes, of a decoder that comes as a package, and the folder of its calls."""
    place = tmp_path_factory.mktemp("gpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(site))
        torch.manual_seed(0)
        model = MemoryEncoderDecoderForCausalLM.from_encoder_decoder_pretrained(
            "package:tiny_chat", "package:tiny_chat", encoder_layers=0, pooling="concat", max_group=16,
            chunk_length=16, memories_per_chunk=4, window_length=64, memory_positions="source",
            projector_start="identity_on_last", freeze_decoder=True, memory_token_id=400,
            copy_token_id=SPECIALS.index("<file_sep>"), blank_token_id=SPECIALS.index("<jupyter_start>"),
        )  # fmt: skip
        model.add_adapters(["decoder"], r=2, lora_alpha=2)
        model.save_pretrained(place / "warm", by_reference=True)
        words = [
            "--train", str(CORPORA / "books" / "validation.parquet"), "--to", str(place / "bundle"),
            "--validation", str(CORPORA / "wikinews" / "validation.parquet"), "--base", "package:tiny_chat",
            "--warm", str(place / "warm"), "--vocab-size", "300", "--tokens", "20000", "--pair-tokens", "20000",
            "--questions", "12", "--room", "90000", "--toy", "--no-branch",
        ]  # fmt: skip
        assert bundle.main(words) == 0
    return place / "bundle"  # from here on the package is only where it has travelled to


def test_parts_run_as_their_files_come_and_leave_records(
    packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "path", [*sys.path])
    sent = json.loads((packed / "calls.json").read_text())
    assert len(sent) > 2, "the bundle is cut into several calls"
    assert "".join(word for one in sent for word in one["command"].split("--parts ")[1].split(",")) == "abcde"
    for number, one in enumerate(sent, 1):
        words = one["command"].replace("/tmp/gpu", str(tmp_path / "gpu")).replace("$OUT", str(tmp_path / "out"))
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        call = words.replace(one["carry"][0], str(packed / f"call{number}")).split(" benchmarks.gpu ")[1].split()
        assert main([*call, "--cpu"]) == 0, capsys.readouterr().err
        files = [file for file in (tmp_path / "out").iterdir() if file.is_file()]
        assert len(files) <= SHIP_FILES and sum(file.stat().st_size for file in files) <= SHIP_BYTES
    for name in PARTS:
        record = read_json(tmp_path / "gpu" / f"gpu_{name}.json")
        assert record["run"]["status"] == "success" and not record["failures"], record["failures"]
        assert record["toy"] and record["hardware"]["device"] == "cpu"
    weights = MemoryEncoderDecoderForCausalLM.from_pretrained(tmp_path / "gpu" / "weights" / "pair")
    assert weights.config.references["decoder"]["id"] == "package:tiny_chat"
    assert main(["--to", str(tmp_path / "gpu"), "--toy", "--cpu"]) == 0
    assert "a done; b done; c done; d done; e done" in capsys.readouterr().out


def test_what_has_not_come_is_waited_for_and_a_torn_file_is_refused(packed: Path, tmp_path: Path):
    assert main(["--to", str(tmp_path), "--toy", "--cpu", "--parts", "c,d,e"]) == 0
    assert read_json(tmp_path / "ended.json") == dict.fromkeys("cde", "waiting")
    calls = sorted(packed.glob("call[0-9]*"))
    for call in calls[:-1]:
        came = receive(call, tmp_path / "payload")
    assert "warm.tar" in came["missing"] and not (tmp_path / "payload" / "warm.tar").exists()
    torn = tmp_path / "torn"
    shutil.copytree(calls[-1], torn)
    piece = next(torn.glob("warm.tar.*"))
    piece.write_bytes(bytes(len(piece.read_bytes())))
    with pytest.raises(ValueError, match="warm.tar is not the file that was sent"):
        receive(torn, tmp_path / "payload")


def test_pieces_of_any_size_join_to_what_was_sent(tmp_path: Path):
    payload = tmp_path / "payload"
    payload.mkdir()
    tokens = torch.arange(1000) * 65
    (payload / "chunks_train.u16.zst").write_bytes(squeeze(tokens))
    (payload / "warm.tar").write_bytes(bundle.tar_of(iter([(Path(__file__), "here.py")])))
    (tmp_path / "calls").mkdir()
    write_calls(tmp_path / "calls", payload, {"toy": True}, 700)
    for call in sorted((tmp_path / "calls").iterdir(), reverse=True):
        assert sum(file.stat().st_size for file in call.glob("*.*") if file.name != bundle.MANIFEST) <= 700
        came = receive(call, tmp_path / "there")
    assert came["missing"] == []
    assert torch.equal(read_tokens(tmp_path / "there", "chunks_train"), tokens.int())
    assert (tmp_path / "there" / "warm" / "here.py").read_text() == Path(__file__).read_text()
    with pytest.raises(ValueError, match="expected ids below 65536"):
        squeeze(torch.tensor([65536]))


def test_a_part_goes_with_the_first_call_that_completes_what_it_needs():
    names = ["chunks_train.u16.zst", "chunks_validation.u16.zst", *PARTS["d"].needs]
    sizes = dict.fromkeys(names, 10)
    pieces = [[{"file": name, "start": 0, "end": 10}] for name in names]
    pieces[-1:] = [[{"file": names[-1], "start": 0, "end": 4}], [{"file": names[-1], "start": 4, "end": 10}]]
    sent = commands(pieces, sizes)
    parts = [one["command"].split("--parts ")[1] for one in sent]
    assert parts[0] == "a,b" and parts[1] == "c" and parts[-1] == "d" and parts[-2] == ","
    assert all(one["timeout_s"] <= 600 and len(one["command"]) < 2000 for one in sent)


def test_what_comes_back_fits_and_the_rest_comes_later(tmp_path: Path):
    weights = tmp_path / "gpu" / "weights" / "autoencoder"
    weights.mkdir(parents=True)
    (weights / "model.safetensors").write_bytes(bytes(5 * SHARD_BYTES))
    write_json(tmp_path / "gpu" / "gpu_c.json", {"run": {"status": "success"}})
    brought: list[str] = []
    for number in range(2):
        out = tmp_path / f"out{number}"
        left = ship(tmp_path / "gpu", out)
        assert sum(file.stat().st_size for file in out.iterdir()) <= SHIP_BYTES
        with tarfile.open(out / "records.tar") as archive:
            assert archive.getnames() == ["gpu_c.json"]
        brought += [file.name for file in out.iterdir() if file.name != "records.tar"]
    assert not left and sorted(brought) == [f"autoencoder.tar.{number:02d}" for number in range(6)], "each once"


def test_a_failure_stays_with_its_measurement_and_time_that_is_over_ends_the_part(tmp_path: Path):
    record = {"metrics": {}, "failures": []}
    job = Job(torch.device("cpu"), True, tmp_path, tmp_path, 60.0, tmp_path / "record.json", record)
    job.measure("bad", lambda: 1 / 0)
    job.measure("good", lambda: {"loss": float("nan")})
    kept = read_json(tmp_path / "record.json")
    assert kept["failures"] == ["bad"] and "ZeroDivisionError" in kept["metrics"]["bad"]["failed"]
    assert kept["metrics"]["good"] == {"loss": "nan"}
    job.seconds = 0.0
    with pytest.raises(OutOfTimeError):
        job.measure("late", lambda: 1)
    with pytest.raises(OutOfTimeError), alarm(0.05):
        while True:
            pass


def test_without_a_gpu_only_toy_sizes_run(tmp_path: Path, capsys: pytest.CaptureFixture):
    assert main(["--to", str(tmp_path), "--cpu"]) == 2
    assert "add --toy" in capsys.readouterr().err
    assert main(["--to", str(tmp_path), "--toy", "--parts", "a,z"]) == 2
    assert "--parts has z" in capsys.readouterr().err


@pytest.mark.gpu
def test_toy_sizes_run_on_the_device(tmp_path: Path):
    assert torch.cuda.is_available()
    assert main(["--to", str(tmp_path), "--toy", "--parts", "a,b"]) == 0
    assert "cuda" in read_json(tmp_path / "gpu_a.json")["metrics"]["device"]
