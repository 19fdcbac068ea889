"""Publish a model: its Hub folder, loaded back in clean processes, and from there the Hub.

```bash
python -m training.publish runs/quickstart/hub --to ~/my-model
python -m training.publish runs/quickstart/hub --to ~/my-model --push me/my-model --private
python -m training.publish runs/quickstart/stages/autoencoder/model --to ~/my-autoencoder --pull-request --push me/ae
python -m training.publish runs/quickstart/hub --to ~/my-half-size --dtype bfloat16
python -m training.publish my-checkpoint --to ~/my-adapter --by-reference --base decoder=HuggingFaceTB/SmolLM2-135M
python -m training.publish model_cards/starter-tiny --refresh
```
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from .command_line import Parser, run_command
from .places import program
from .publishing.bases import Base, check_bases_on_hub, find_bases
from .publishing.cards import card_licence, stage_record
from .publishing.hub_folder import (
    ALLOWED_FILES,
    PublishError,
    check_complete,
    load_checkpoint,
    load_processor,
    refresh_hub_folder,
    write_hub_folder,
)
from .publishing.provenance import NOTHING_RECORDED
from .publishing.push import check_target, push_folder
from .publishing.verification import verify_hub_folder
from .records.record import read_json

__all__ = ["PublishError", "load_checkpoint", "main", "verify_hub_folder", "write_hub_folder"]


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = Parser(
        prog=program("publish"),
        description="Write a checkpoint as a Hub folder, load it back in clean processes, and push it.",
        epilog="Without --push nothing leaves this machine. The token is that of `hf auth login` or HF_TOKEN.",
    )
    parser.add_argument("checkpoint", help="folder of a trained model: runs/<name>/hub, or any stage's model folder")
    place = parser.add_mutually_exclusive_group(required=True)
    place.add_argument("--to", metavar="FOLDER", help="the Hub folder; an earlier one is replaced")
    place.add_argument(
        "--refresh",
        action="store_true",
        help="CHECKPOINT is a Hub folder: write its card, record and code anew; its weights stay as they are",
    )
    parser.add_argument(
        "--record", metavar="FILE", help="record of the run (default: record.json in CHECKPOINT or of its run)"
    )
    parser.add_argument("--stage", help="the record's stage that this is (default: from the checkpoint's place)")
    parser.add_argument("--domains", metavar="FILE", help="record of training.domains: results on other text")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="auto", help="numbers of the published weights "
        "(default: as they are); measure what rounding costs with training.domains"
    )  # fmt: skip
    _add_card_options(parser)
    reference = parser.add_argument_group("by reference")
    reference.add_argument(
        "--by-reference", action="store_true", help="leave out weights of encoder and decoder that are their bases'"
    )
    reference.add_argument(
        "--base",
        action="append",
        default=[],
        metavar="PART=ID[@REVISION]",
        help="what encoder or decoder comes from, a Hub id or package:NAME (default: what the checkpoint says); a "
        "part not named goes by value",
    )
    reference.add_argument(
        "--base-folder", action="append", default=[], metavar="PART=FOLDER", help="a copy of it, against a download"
    )
    hub = parser.add_argument_group("the Hub")
    hub.add_argument("--push", metavar="USER/NAME", help="push the folder there, in one commit; created if need be")
    hub.add_argument("--private", action="store_true", help="create the repository private")
    hub.add_argument("--revision", help="push to this branch, or to the open pull request refs/pr/N")
    hub.add_argument("--branch", help="push to this branch, made from main if it is not there")
    hub.add_argument("--pull-request", action="store_true", help="open a pull request instead of changing main")
    hub.add_argument("--message", help="first line of the commit")
    return parser


def _add_card_options(parser: argparse.ArgumentParser) -> None:
    card = parser.add_argument_group("the card", "what no record tells; --refresh keeps what was said before")
    card.add_argument("--name", help="name of the model (default: the repository's, or the recipe's)")
    card.add_argument(
        "--base-model",
        action="append",
        default=[],
        metavar="NAME",
        help="a model it was trained from: a Hub id, a folder, or package:MODULE/FOLDER",
    )
    card.add_argument(
        "--licence", metavar="ID", help="licence of the weights, by the Hub's name or as NAME=LINK (default: that of "
        "bases and text, where it is known)"
    )  # fmt: skip
    card.add_argument(
        "--language", action="append", default=[], metavar="CODE", help="of the text (default: as its source says)"
    )
    card.add_argument("--project", metavar="URL", help="address of the project that made it")


def publish(options: argparse.Namespace, command: str) -> dict[str, Any]:
    """Write, verify and push, as the command line says; returns what was written and pushed."""
    target = {name: getattr(options, name) for name in ("private", "revision", "branch", "pull_request")}
    if options.push:
        check_target(options.push, **target)
    elif any(target.values()) or options.message:
        raise ValueError("--private, --revision, --branch, --pull-request and --message are for --push USER/NAME")
    checkpoint = Path(options.checkpoint).expanduser()
    record = find_record(checkpoint, options.record, options.stage)
    if options.domains:
        measured = _read(Path(options.domains).expanduser())
        measured_by = {name: measured[name] for name in ("run", "code", "hardware", "inputs") if name in measured}
        record = {**(record or {}), "domains": measured["domains"], "domains_run": measured_by}
    bases = _find_bases(checkpoint, options)
    if options.dtype != "auto" and (options.by_reference or options.refresh):
        raise ValueError("--dtype rounds all weights; with --by-reference or --refresh they stay as they are")
    folder, model, referred = _write(checkpoint, record, bases, options)
    print("loading it in clean processes ...", flush=True)
    report = verify_hub_folder(folder, model, bases=referred)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{options.to or checkpoint}: {size / 1e6:.1f} MB, loads bit for bit as folder and as repository")
    print(f"checked: {', '.join(report['hub']['loaded'])}, forward and generation")
    result = {"folder": str(options.to or checkpoint), "bytes": size, "verified": report}
    if options.push:
        print(f"pushing to {options.push} ...", flush=True)
        pushed = push_folder(
            folder,
            options.push,
            replaces=ALLOWED_FILES,
            message=options.message or f"Publish {options.name or model.config.model_type}",
            **target,
        )
        for name in pushed.deleted:
            print(f"deleted there: {name}")
        print(f"published: {pushed.url}")
        print(f'from_pretrained("{pushed.repo_id}", revision="{pushed.revision}", trust_remote_code=True)')
        result |= {"url": pushed.url, "revision": pushed.revision}
    return result


def _write(
    checkpoint: Path, record: dict[str, Any] | None, bases: Mapping[str, Base], options: argparse.Namespace
) -> tuple[Path, PreTrainedModel, Mapping[str, Base]]:
    """Write the Hub folder, or refresh it; returns it with its model and the bases that it refers to."""
    said = {
        "model_name": options.name or options.push,
        "repository": options.push,
        "base_models": options.base_model,
        "licence": options.licence,
        "language": options.language,
        "project": options.project,
    }
    context = {name: value for name, value in said.items() if value}
    model, _ = load_checkpoint(checkpoint, bases, options.dtype)
    referred = bases if options.by_reference or options.refresh else {}
    if options.push:
        check_bases_on_hub(referred)
    references = {part: {"id": base.id} for part, base in referred.items()}
    licence = card_licence(model, record, {**context, "references": references})
    if not licence.is_known and (options.push or licence.reason != NOTHING_RECORDED):
        raise ValueError(
            f"the licence of the weights is not known: {licence.reason}. Say it with --licence ID, for example "
            "--licence llama3.2, or with --licence NAME=LINK for one that the Hub has no name for"
        )
    print(f"writing {options.to or checkpoint} ...", flush=True)
    if options.refresh:
        return refresh_hub_folder(checkpoint, record, context, bases), model, referred
    return write_hub_folder(model, load_processor(checkpoint), options.to, record, context, referred), model, referred


def _find_bases(checkpoint: Path, options: argparse.Namespace) -> dict[str, Base]:
    """Find what a checkpoint stands on, if it is saved by reference or is to be published so."""
    check_complete(checkpoint)
    config = read_json(checkpoint / "config.json") or {}
    if options.by_reference or config.get("references"):
        return find_bases(config, options.base, options.base_folder)
    if options.base or options.base_folder:
        raise ValueError("--base and --base-folder are for --by-reference, or for a checkpoint saved so")
    return {}


def find_record(checkpoint: Path, given: str | None, stage: str | None) -> dict[str, Any] | None:
    """Find the record of a checkpoint: the one given, the one beside the weights, or its run's, cut to its stage.

    Raises:
        ValueError: If a given file is missing, a record is no JSON, or the record has no such stage.
    """
    if given and not Path(given).expanduser().is_file():
        raise ValueError(f"{given} is no file; give the record of the run, or leave --record out")
    record: Mapping[str, Any] | None = read_json(Path(given).expanduser()) if given else None
    places = checkpoint.resolve()
    if record is None:
        record = read_json(places / "record.json")
    if record is None and places.name == "model" and places.parents[1].name == "stages":
        record = read_json(places.parents[2] / "record.json")
        stage = stage or places.parent.name
    if stage is None:
        return None if record is None else dict(record)
    if record is None:
        raise ValueError(f"--stage {stage} needs the record of its run; give it with --record FILE")
    return stage_record(record, stage)


def _read(path: Path) -> dict[str, Any]:
    found = read_json(path)
    if not isinstance(found, dict) or "domains" not in found:
        raise ValueError(f"{path} is no record of training.domains; make one with `python -m training.domains`")
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return run_command(build_parser(), publish, arguments)


if __name__ == "__main__":
    sys.exit(main())
