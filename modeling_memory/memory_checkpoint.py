"""Checkpoints: loaded whole or refused, written whole or not at all."""

import contextlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers.modeling_utils import PreTrainedModel

TRAINED = "trained.safetensors"
"""What a model saved by reference was trained to: its only weights file."""
WEIGHTS = re.compile(rf"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?|{re.escape(TRAINED)}")
"""Files that loading takes weights from. One that an earlier save left would win over new ones of another name."""
ASIDE = ".saving-"
ABANDONED = 24 * 3600
"""Seconds after which what a killed save left aside is taken for nobody's."""
MOVING = "moving"
"""File beside what is written aside: names that are about to take their places, last the one that decides."""
LONGEST_MOVE = 2.0
"""Seconds that renaming a few files never takes: a save that has not ended by then was killed."""


# The library asks in the midst of loading which missing weights to draw, and hands on nothing of the caller's wishes.
_DRAWS_MISSING: ContextVar[bool] = ContextVar("draws_missing", default=False)


def load_whole(load: Callable[..., Any], *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
    """Load a model by the library's `from_pretrained`, and refuse weights that do not fit it.

    The library would draw what is missing at random, leave out what it has no place for, and only print so.

    Args:
        load (`Callable`): `from_pretrained` of the library, bound to a class.
        args: As in the library.
        output_loading_info (`bool`): Whether the caller asks for the names; then none is refused.
        kwargs: As in the library. An empty `state_dict` asks for fresh weights.

    Raises:
        ValueError: If the config describes no model, or a weight is missing that is tied to no other, has another
            shape, or has no place in the model.
    """
    is_fresh = kwargs.get("state_dict") is not None and not kwargs["state_dict"]
    if args and isinstance(args[0], (str, os.PathLike)):
        undo_killed_saves(Path(args[0], kwargs.get("subfolder") or ""))
    token = _DRAWS_MISSING.set(output_loading_info or is_fresh)
    try:
        model, report = load(*args, output_loading_info=True, **kwargs)
    except SafetensorError as error:
        raise ValueError(f"The weights of {args[0] if args else 'the checkpoint'} are damaged: {error}.") from error
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
        if "unexpected keyword argument" in str(error):  # the caller's, in the caller's words
            raise
        raise ValueError(
            f"The library builds no model of the config of {args[0] if args else 'the checkpoint'} "
            f"({type(error).__name__}: {error}). Load a checkpoint with its own config, and check the options given."
        ) from error
    except RuntimeError as error:
        if isinstance(error.__context__, ValueError):  # ours: the library reports shapes on its way out
            raise error.__context__ from None
        if "negative dimension" in str(error):
            raise ValueError(f"The config has a size below zero: {error}. Load a checkpoint with its own.") from error
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise ValueError(
            f"{args[0] if args else 'The checkpoint'} has weights of another shape than its config says; the report "
            "above names them. Load a checkpoint with its own config."
        ) from error
    finally:
        _DRAWS_MISSING.reset(token)
    if output_loading_info:
        return model, report
    if is_fresh:
        return model
    mismatched = [entry if isinstance(entry, str) else entry[0] for entry in report["mismatched_keys"]]
    for names, fault in (
        (report["missing_keys"], "has no weights for"),
        (mismatched, "has weights of another shape for"),
        (report["unexpected_keys"], "has weights that its config knows no place for:"),
    ):
        if names:
            raise ValueError(
                f"{args[0] if args else 'The checkpoint'} {fault} {list_names(names)}. Load a complete checkpoint of "
                "this model, with its own config; `output_loading_info=True` loads what fits and names the rest."
            )
    return model


def refuse_a_missing_part(model: PreTrainedModel, missing: Any, parts: tuple[str, ...]) -> None:
    """Refuse a checkpoint without any weight of a part, before memory is taken for random ones.

    A damaged config may ask for billions of them. A caller of [`load_whole`] who asks for them gets them.

    Args:
        model (`PreTrainedModel`): The model that is being loaded.
        missing (`Iterable[str]`): Names of weights that the checkpoint lacks.
        parts (`tuple[str, ...]`): Names of its parts.

    Raises:
        ValueError: Naming the part and its size.
    """
    for part in () if _DRAWS_MISSING.get() else parts:
        sizes = {name: value.numel() for name, value in model.named_parameters() if name.startswith(f"{part}.")}
        if sizes and sizes.keys() <= set(missing):
            raise ValueError(
                f"The checkpoint has no weights for the {part}, of which its config says that it has "
                f"{sum(sizes.values()):,}: {list_names(sizes)}. Load a complete checkpoint, with its own config."
            )


def list_names(names: Any) -> str:
    """Name the first five of many, and count the rest."""
    names = sorted(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


@contextlib.contextmanager
def written_aside(folder: str | os.PathLike) -> Iterator[Path]:
    """Give a place to write a checkpoint to; what was written takes its place in the folder when all of it is there.

    Whatever stops the writing, a full disk or a base that cannot be reached, the folder is as it was before. Weights
    of an earlier save go at the end, after new ones have come; all other files of the folder stay.

    Args:
        folder (`str` or `os.PathLike`): Where the checkpoint belongs; made if it is not there.

    Raises:
        ValueError: If the folder is a file.
    """
    target = Path(folder)
    if target.is_file():
        raise ValueError(f"{target} is a file; give a folder to save to.")
    made = [place for place in (target, *target.parents) if not place.exists()]
    target.mkdir(parents=True, exist_ok=True)
    undo_killed_saves(target)
    for left in target.glob(f"{ASIDE}*"):
        if time.time() - left.stat().st_mtime > ABANDONED:
            shutil.rmtree(left, ignore_errors=True)
    # Inside the folder, so that it is the same filesystem and a rename copies nothing.
    aside = Path(tempfile.mkdtemp(prefix=ASIDE, dir=target))
    try:
        yield aside
        _move_in(aside, target)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        # Only where it failed: of many processes that save, one writes, and the others must not take its folder away.
        for place in made:
            with contextlib.suppress(OSError):  # not empty
                place.rmdir()
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _move_in(aside: Path, target: Path) -> None:
    """Rename files into a folder, drop weights of an earlier save, and rename the config last; undo all if one cannot.

    The config decides: as long as it is the old one, a kill leaves what [`undo_killed_saves`] puts back.
    """
    names = sorted((path.name for path in aside.iterdir()), key=lambda name: (name == "config.json", name))
    new = {name for name in names if WEIGHTS.fullmatch(name)}
    stale = [path.name for path in target.iterdir() if WEIGHTS.fullmatch(path.name) and new and path.name not in new]
    before = aside / "before"
    before.mkdir()
    # Writers of weights keep others from reading them, whatever the user's umask lets them read.
    readable = before.stat().st_mode & 0o666
    for name in new:
        os.chmod(aside / name, readable)
    (aside / MOVING).write_text("\n".join(names), "utf-8")
    try:
        for name in names:
            if name == names[-1]:
                for old in stale:
                    os.replace(target / old, before / old)
            if (target / name).exists():
                _keep(target / name, before / name)
            os.replace(aside / name, target / name)
    except BaseException:
        _undo(aside, target)
        raise


def _undo(aside: Path, target: Path) -> None:
    """Put back what was there before a save began to move its files in."""
    before, moving = aside / "before", aside / MOVING
    for name in moving.read_text("utf-8").split("\n"):
        if not (aside / name).exists() and not (before / name).exists():  # nothing of its name was there
            (target / name).unlink(missing_ok=True)
    moving.write_text("", "utf-8")  # from here on only what is put back counts, if this is cut off, too
    for path in before.iterdir():
        os.replace(path, target / path.name)


def undo_killed_saves(folder: Path) -> None:
    """Put back what a save that was killed between two of its files had replaced; a folder without any is left alone.

    Args:
        folder (`Path`): A checkpoint's folder, or anything else.

    Raises:
        ValueError: If the files cannot be put back.
    """
    for moving in folder.glob(f"{ASIDE}*/{MOVING}"):
        aside, end = moving.parent, time.time() + LONGEST_MOVE
        while moving.exists() and time.time() < end:  # another process may just be saving
            time.sleep(0.05)
        if not moving.exists():
            continue
        try:
            names = moving.read_text("utf-8").split("\n")
            if (aside / names[-1]).exists():
                _undo(aside, folder)
            shutil.rmtree(aside)
        except OSError as error:
            raise ValueError(
                f"A save to {folder} was killed half-way, and the files that it had replaced cannot be put back "
                f"({error}). Make the folder writable and load it again; they are in {aside / 'before'}."
            ) from error


def _keep(path: Path, place: Path) -> None:
    """Hold on to a file under a second name; a copy where the filesystem has no hard links."""
    try:
        os.link(path, place, follow_symlinks=False)
    except (OSError, NotImplementedError):
        shutil.copy2(path, place, follow_symlinks=False)


def save_whole(save: Callable[..., None], folder: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
    """Save by the library's `save_pretrained`, whole or not at all.

    Args:
        save (`Callable`): `save_pretrained` of the library, bound to a model.
        folder (`str` or `os.PathLike`): Where the checkpoint belongs.
        args: As in the library.
        kwargs: As in the library.
    """
    if kwargs.get("push_to_hub"):
        kwargs.setdefault("repo_id", Path(folder).resolve().name)  # the library would take the name of the place aside
    with written_aside(folder) as aside:
        save(aside, *args, **kwargs)
