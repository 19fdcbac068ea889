"""Recipes: one YAML file says everything about a run, and anything it does not know is an error.

A recipe is read in three steps, each of which names the dotted path of what it refuses:

1. `load_recipe` parses the YAML (a repeated key is an error) and applies `key=value` overrides;
2. `from_mapping` turns the plain mapping into the dataclasses below, checking names and types;
3. `check_recipe` checks what one field alone cannot show: stage names, references, objectives, lengths.
"""

import glob
import importlib.util
import json
import re
import typing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..data.sources import HUB, Documents, HubDataset
from ..places import REPOSITORY, portable_paths
from .strict_yaml import apply_override, from_mapping, nearest, parse_yaml, yaml_names

StageKind = Literal["autoencoder", "causal_lm", "memory"]
Suite = Literal["retention", "copy", "blank_copy", "clm"]

STAGE_OBJECTIVES: dict[str, tuple[str, ...]] = {
    "autoencoder": ("reconstruction",),
    "causal_lm": ("causal",),
    "memory": ("causal", "copy", "blank_copy", "recall", "qa", "distillation"),
}
CHANGEABLE = {"freeze_encoder", "freeze_decoder", "encoder_trained_from", "memories_per_chunk"}
PACKAGE = "package:"


@dataclass(frozen=True)
class DataRecipe:
    """Text of the three splits: glob patterns, relative to the current directory or the repository, or datasets of the
    Hub as `hub:ID@COMMIT:CONFIG:SPLIT`.

    With `streaming` the train split is tokenised as far as it is read and never held in memory; rows are shuffled
    within blocks of `shuffle_rows`. `cache_dir` keeps tokens and the states of frozen encoders (`encode_once`) where
    several runs find them; default: the run's own folder.

    `folded` is the share of training documents that are written with the characters of a plain keyboard, and `typed`
    is how many characters of made-up lists, code, numbers and addresses are read beside them.
    """

    train: list[str]
    validation: list[str]
    test: list[str]
    text_column: str = "text"
    max_train_tokens: int | None = None
    streaming: bool = False
    shuffle_rows: int = 4096
    cache_dir: str | None = None
    folded: float = 0.0
    typed: int = 0


@dataclass(frozen=True)
class TokenizerRecipe:
    """A byte-level BPE trained on the train split, or an existing one, its path like that of a pretrained model.

    `copy_token` and `blank_token` name tokens of an existing one that serve as COPY and BLANK: rows of a pretrained
    table that its text never uses.
    """

    vocab_size: int = 2048
    path: str | None = None
    revision: str | None = None
    gguf_file: str | None = None
    max_train_bytes: int | None = None
    copy_token: str | None = None
    blank_token: str | None = None


@dataclass(frozen=True)
class PretrainedRecipe:
    """A model that was trained elsewhere; stages name it in `from` as they name earlier stages.

    `path` is a Hub id, a folder relative to the current directory or the repository, or `package:MODULE` or
    `package:MODULE/FOLDER` of an installed package. `gguf_file` names a file of quantised weights in it.
    `tokenizer: own` means that it reads text with the tokenizer beside its weights, `shared` with the run's. `config`
    is its architecture; a model that turns out to be another one is refused.
    """

    path: str
    revision: str | None = None
    gguf_file: str | None = None
    tokenizer: Literal["own", "shared"] = "own"
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def options(self) -> dict[str, Any]:
        """What else `from_pretrained` takes."""
        given = {"revision": self.revision, "gguf_file": self.gguf_file}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def base(self) -> str:
        """What `from_encoder_decoder_pretrained` takes: a package by its name, so that it is saved by reference."""
        return self.path if self.path.startswith(PACKAGE) and "/" not in self.path else self.source

    @property
    def source(self) -> str:
        """What `from_pretrained` takes: the folder where it is one, else the id.

        Raises:
            ValueError: If the path names a package that is not installed.
        """
        if self.path.startswith(PACKAGE):
            module, _, inner = self.path.removeprefix(PACKAGE).partition("/")
            found = importlib.util.find_spec(module)
            if found is None or found.origin is None:
                raise ValueError(
                    f"{self.path} is in the package {module}, which is not installed; pip install "
                    f"{module.replace('_', '-')}, or give another path"
                )
            return str(Path(found.origin).parent / inner)
        beside = REPOSITORY / self.path
        return str(beside) if not Path(self.path).is_dir() and beside.is_dir() else self.path


@dataclass(frozen=True)
class RowsRecipe:
    """How a stage cuts the token stream: lengths in text tokens.

    `source_length` (default `row_length`) is how much of a row the copy objectives take as their source; with
    `vary_source` the rows of a batch take one window, two, ... up to it in turn.
    `shortened` is the share of an autoencoder's chunks, and in the slots layout of the copies' sources, that are cut
    to a random length; a cut copy learns to write the end token after its last. Validation reads them whole.
    `random_tokens` is the share of these rows in which tokens, from one to all, become random ones: what a memory must
    hold is then not guessed from its neighbours, and no token of the vocabulary stays unlearnt. Validation has none.
    `window_length` is for `causal_lm` only: the decoder then reads each window of the row by itself, which
    makes it the no-memory baseline of a memory model with that window; default is the whole row.
    Stages with equal `seed` (default: the recipe's) and lengths read the same rows in the same order.
    `encode_once` keeps the states of a frozen encoder that has its own tokenizer on disk and trains from them.
    `every` gives an objective only every n-th row of a batch: `{causal: 4}` rehearses on a quarter of the rows.
    With `documents` a row is one document, or a piece of at most `row_length` tokens of a longer one, and rows are
    padded; without it rows of `row_length` tokens cross from one document into the next.
    `num_memories` are memories per chunk, of which each batch draws one number, so that one model serves many
    budgets; default: always `model.memories_per_chunk`. `num_memories_weights` says how often each is drawn. Slots
    layout only.
    `begin` puts the decoder's begin token before the slots.
    `recall_prompt` and `recall_length` are the tokens that the objective recall shows and asks for.
    `questions` are files for the objective qa (`.jsonl` or `.parquet` with context, question and answer), or
    `cloze:N` or `wh:N` for N questions made of the run's own training text; `validation_questions` those that are
    asked in validation, made of its validation text. Slots layout only.
    `taught` is the objective whose text distillation compares: causal, copy, recall or qa.
    Where the encoder has a tokenizer of its own, lengths count the encoder's tokens: a row is `row_length` of them,
    the first `source_length` (default: half of the row) become memories, and the decoder reads the rest in its own.
    """

    row_length: int
    source_length: int | None = None
    vary_source: bool = False
    shortened: float = 0.0
    random_tokens: float = 0.0
    window_length: int | None = None
    layout: Literal["self", "slots"] = "self"
    marker: Literal["token", "none"] = "token"
    seed: int | None = None
    every: dict[str, int] = field(default_factory=dict)
    encode_once: bool = False
    documents: bool = False
    num_memories: list[int] = field(default_factory=list)
    num_memories_weights: list[float] = field(default_factory=list)
    begin: bool = False
    recall_prompt: int = 8
    recall_length: int = 32
    questions: list[str] = field(default_factory=list)
    validation_questions: list[str] = field(default_factory=list)
    taught: Literal["causal", "copy", "recall", "qa"] = "causal"


@dataclass(frozen=True)
class TrainingRecipe:
    """Optimisation of one stage. `batch_size` counts rows per process and accumulation step.

    Distillation compares distributions, softened by `distillation_temperature`, and at `distillation_depths` (shares
    of the decoder's layers, 1 being the last) states, with `distillation_states_weight`.
    """

    max_steps: int
    batch_size: int = 64
    gradient_accumulation_steps: int = 1
    optimizer: Literal["muon", "adamw"] = "muon"
    learning_rate: float = 5.0e-3
    muon_learning_rate: float = 1.5e-2
    lr_multipliers: dict[str, float] = field(default_factory=dict)
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    max_grad_norm: float = 1.0
    schedule: Literal["warmup_stable_decay", "linear", "cosine", "constant"] = "warmup_stable_decay"
    warmup: float = 0.02
    decay: float = 0.3
    bf16: bool = True
    gradient_checkpointing: bool = False
    attention: Literal["eager", "sdpa", "flash_attention_2", "flex_attention"] | None = None
    compile: bool = False
    loss_chunk: int | None = None
    group_by_length: bool = False
    watch_steps: int | None = None
    distillation_temperature: float = 1.0
    distillation_depths: list[float] = field(default_factory=list)
    distillation_states_weight: float = 1.0
    num_workers: int = 0
    logging_steps: int = 50
    eval_steps: int | None = None
    eval_rows: int = 128
    save_steps: int | None = None
    save_total_limit: int = 2


@dataclass(frozen=True)
class WarmStartRecipe:
    """What a new stage takes over from earlier ones, besides the weights it is joined from.

    `tables_from` copies token table and output head of that stage where shapes agree; `projector` is where a fresh
    projector starts, `last_token` being the least-squares map from a memory to the embedding of the last token that it
    has read, `fitted` the start from which a decoder reads memories before any training, its adapters fitted, too, to
    `fitted_rows` rows of text; `projector_scale` multiplies its last linear weight.
    """

    tables_from: str | None = None
    projector: Literal["default", "identity", "last_token", "fitted"] = "default"
    fitted_rows: int = 512
    projector_scale: float = 1.0


@dataclass(frozen=True)
class StageRecipe:
    """One model trained on one mixture of objectives, starting from nothing or from earlier stages.

    `adapters` are the arguments of `add_adapters`: `{parts: [decoder], r: 8}` puts LoRA beside the frozen decoder.
    """

    name: str
    kind: StageKind
    data: RowsRecipe
    training: TrainingRecipe
    model: dict[str, Any] = field(default_factory=dict)
    from_: dict[str, str] = field(default_factory=dict)
    objectives: dict[str, float] = field(default_factory=dict)
    warm_start: WarmStartRecipe = field(default_factory=WarmStartRecipe)
    adapters: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class EvaluationRecipe:
    """What is measured on the test split at the end. Lengths in tokens; `num_rows` bounds the cost."""

    suites: list[Suite] = field(default_factory=lambda: ["retention", "blank_copy", "copy", "clm"])
    num_rows: int = 256
    num_generated_rows: int = 32
    batch_size: int = 32
    row_length: int | None = None
    source_length: int | None = None
    autoencoder: str | None = None
    no_memory: str | None = None
    full_context: str | None = None


@dataclass(frozen=True)
class PublishRecipe:
    """The stage whose model becomes the Hub folder; default: the last memory stage.

    With `by_reference` memory stages and the Hub folder hold only what was trained, and name the pretrained models
    that the rest comes from, packages or Hub ids. `dtype` rounds what the Hub folder holds.
    """

    stage: str | None = None
    verify: bool = True
    by_reference: bool = False
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"


@dataclass(frozen=True)
class Recipe:
    """A whole run, as read from YAML. See `configuration/README.md` for each key."""

    name: str
    data: DataRecipe
    stages: list[StageRecipe]
    description: str = ""
    seed: int = 0
    output_dir: str | None = None
    use_cpu: bool = False
    threads: int | None = None
    report_to: list[str] = field(default_factory=list)
    tokenizer: TokenizerRecipe = field(default_factory=TokenizerRecipe)
    evaluation: EvaluationRecipe = field(default_factory=EvaluationRecipe)
    publish: PublishRecipe = field(default_factory=PublishRecipe)
    pretrained: dict[str, PretrainedRecipe] = field(default_factory=dict)

    def encoder_of(self, stage: StageRecipe) -> PretrainedRecipe | None:
        """Return the pretrained encoder of a memory stage, if it has one with a tokenizer of its own."""
        while stage.from_.get("model", "") in {other.name for other in self.stages}:
            stage = self.stage(stage.from_["model"])
        found = self.pretrained.get(stage.from_.get("encoder", ""))
        return found if found is not None and found.tokenizer == "own" else None

    def stage(self, name: str) -> StageRecipe:
        """Return the stage called `name`."""
        return next(stage for stage in self.stages if stage.name == name)

    @property
    def published_stage(self) -> str:
        """Name of the stage that is published: the one asked for, else the last memory stage."""
        if self.publish.stage is not None:
            return self.publish.stage
        memory = [stage.name for stage in self.stages if stage.kind == "memory"]
        return memory[-1] if memory else self.stages[-1].name

    def to_mapping(self) -> dict[str, Any]:
        """Return the resolved recipe as plain data with the YAML's key names and no absolute path."""
        return portable_paths(yaml_names(asdict(self)))


def load_recipe(path: str | Path, overrides: typing.Sequence[str] = ()) -> Recipe:
    """Read, override, type and check a recipe.

    Args:
        path (`str` or `Path`): YAML file; a bare name is also looked up in `configuration/recipes/`.
        overrides (`Sequence[str]`, *optional*): `key=value` with a dotted key, stages by name:
            `stages.autoencoder.training.max_steps=10`. The value is read as YAML.

    Raises:
        ValueError: If the file is missing, a key is unknown or repeated, a value has the wrong type, or the
            parts do not fit together.
    """
    file = find_recipe(path)
    mapping = parse_yaml(file.read_text(encoding="utf-8"), str(path))
    if not isinstance(mapping, dict):
        raise ValueError(f"{path} holds {type(mapping).__name__}, expected a mapping with name, data and stages")
    for override in overrides:
        mapping = apply_override(mapping, override)
    recipe = from_mapping(Recipe, mapping)
    check_recipe(recipe)
    return recipe


def find_recipe(path: str | Path) -> Path:
    """Return the file of a recipe given as path or as the bare name of a shipped one."""
    shipped = REPOSITORY / "configuration" / "recipes"
    for candidate in (Path(path), REPOSITORY / path, shipped / path, shipped / f"{path}.yaml"):
        if candidate.is_file():
            return candidate
    names = sorted(file.stem for file in shipped.glob("*.yaml"))
    raise ValueError(f"recipe {path} was not found; give a YAML file or one of the shipped: {', '.join(names)}")


def resolve_files(patterns: list[str], path: str = "files") -> list[Path]:
    """Expand file names and glob patterns, in sorted order.

    Raises:
        ValueError: If a pattern matches no file; the message names the pattern and where it was looked for.
    """
    files: list[Path] = []
    for pattern in patterns:
        found: list[str] = []
        for root in ("", f"{REPOSITORY}/"):
            found = found or sorted(glob.glob(pattern if Path(pattern).is_absolute() else root + pattern))
        if not found:
            raise ValueError(
                f"{path}: no file matches {pattern!r} in the current directory or the repository; correct the path or "
                "build the file first"
            )
        files.extend(Path(name) for name in found)
    if not files:
        raise ValueError(f"{path} is empty; name at least one text file")
    return files


def resolve_documents(patterns: list[str], text_column: str, path: str = "files") -> Documents:
    """Expand file names and glob patterns, each in sorted order, and datasets of the Hub, into a source of documents.

    Raises:
        ValueError: If a pattern matches no file, or a dataset has no revision.
    """
    parts: list[Path | HubDataset] = []
    for pattern in patterns or [""]:
        found = (
            [HubDataset.parse(pattern)] if pattern.startswith(HUB) else resolve_files([pattern] * bool(pattern), path)
        )
        parts.extend(found)
    return Documents(tuple(parts), text_column)


STAGE_COUNTS = {
    "training": (
        "max_steps", "batch_size", "gradient_accumulation_steps", "logging_steps", "eval_rows", "save_total_limit",
        "loss_chunk", "eval_steps", "save_steps", "watch_steps",
    ),
    "data": ("row_length", "source_length", "window_length", "recall_prompt", "recall_length", "num_memories"),
}  # fmt: skip
RECIPE_COUNTS = {
    "data": ("shuffle_rows", "max_train_tokens"),
    "tokenizer": ("vocab_size", "max_train_bytes"),
    "evaluation": ("num_rows", "num_generated_rows", "batch_size"),
}


def check_recipe(recipe: Recipe) -> None:
    """Check what needs more than one field: names, references, objectives and lengths.

    Raises:
        ValueError: Naming the dotted path, what was given and what was expected.
    """
    names = [stage.name for stage in recipe.stages]
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", recipe.name):
        raise ValueError(f"name is {recipe.name!r}; it becomes a folder: use letters, digits, '-', '_' and '.'")
    if not names:
        raise ValueError("stages is empty; a recipe needs at least one stage")
    _check_counts(recipe, RECIPE_COUNTS, "")
    _check_positive(recipe.threads, "threads")
    if not 0 <= recipe.data.folded <= 1:
        raise ValueError(f"data.folded is {recipe.data.folded}; it is a share: expected 0 to 1")
    if recipe.data.typed < 0:
        raise ValueError(f"data.typed is {recipe.data.typed}, expected 0 or more characters")
    if recipe.data.streaming and (recipe.data.folded or recipe.data.typed):
        raise ValueError("data.folded and data.typed change a text that is held in memory; leave data.streaming out")
    if recipe.data.streaming and recipe.tokenizer.path is None and recipe.tokenizer.max_train_bytes is None:
        raise ValueError(
            "data.streaming reads text only as far as it is needed, so tokenizer.max_train_bytes must say on how much "
            "of it the tokenizer is trained; or name a finished tokenizer in tokenizer.path"
        )
    for name in recipe.pretrained:
        if name in names:
            raise ValueError(f"pretrained.{name} has the name of a stage; names must differ")
    earlier: dict[str, StageRecipe] = {}
    for stage in recipe.stages:
        _check_stage(stage, recipe, earlier, f"stages.{stage.name}")
        earlier[stage.name] = stage
    for key, kind in (("no_memory", "causal_lm"), ("full_context", "causal_lm"), ("autoencoder", "autoencoder")):
        _check_reference(getattr(recipe.evaluation, key), (kind,), earlier, f"evaluation.{key}")
    _check_reference(recipe.publish.stage, ("memory", "autoencoder"), earlier, "publish.stage")
    _check_by_reference(recipe)


def _check_stage(stage: StageRecipe, recipe: Recipe, earlier: dict[str, StageRecipe], path: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][\w-]*", stage.name):
        raise ValueError(f"{path}: a stage name becomes a folder: use letters, digits, '-' and '_'")
    if stage.name in earlier:
        raise ValueError(f"{path} is defined twice; stage names must differ")
    _check_counts(stage, STAGE_COUNTS, path)
    _check_references(stage, earlier, recipe.pretrained, path)
    _check_objectives(stage, path)
    _check_training(stage.training, path)
    _check_rows(stage, path)
    _check_once(stage, recipe, path)
    _check_documents(stage, path, streaming=recipe.data.streaming)
    _check_shortened(stage, recipe, path)
    _check_budgets(stage, recipe, path)
    _check_asked(stage, path)
    _check_distillation(stage, path)


def _check_counts(owner: Any, keys: dict[str, tuple[str, ...]], path: str) -> None:
    """Check counts of a part of a recipe: each is 1 or more, or is not given."""
    for part, names in keys.items():
        for name in names:
            value = getattr(getattr(owner, part), name)
            for number in value if isinstance(value, list) else [value]:
                _check_positive(number, f"{path}.{part}.{name}".lstrip("."))


def refers_to_bases(pretrained: PretrainedRecipe) -> bool:
    """Whether a pretrained model is a folder that was saved by reference, so that its bases have names."""
    config = Path(pretrained.source) / "config.json"
    return config.is_file() and bool(json.loads(config.read_text(encoding="utf-8")).get("references"))


def _check_by_reference(recipe: Recipe) -> None:
    """Check that what is to be left out of the folders can be named, and is found again under that name."""
    for stage in recipe.stages if recipe.publish.by_reference else ():
        named = [recipe.pretrained[name] for name in stage.from_.values() if name in recipe.pretrained]
        fresh = stage.kind == "memory" and "model" not in stage.from_
        if (fresh and not named) or any(
            not one.path.startswith(PACKAGE) and Path(one.source).is_dir() and not refers_to_bases(one)
            for one in named
        ):
            raise ValueError(
                f"publish.by_reference is set, but stages.{stage.name} takes its encoder and decoder from no package "
                "or Hub id, by which they would be found again; leave it out"
            )


def _check_reference(
    name: str | None, kinds: tuple[str, ...], earlier: dict[str, StageRecipe], path: str
) -> StageRecipe | None:
    if name is None:
        return None
    if name not in earlier:
        raise ValueError(
            f"{path} is {name!r}{nearest(name, list(earlier))}, expected an earlier stage: "
            f"{', '.join(earlier) or 'there is none'}"
        )
    if earlier[name].kind not in kinds:
        raise ValueError(f"{path} is {name!r}, a stage of kind {earlier[name].kind}; expected {' or '.join(kinds)}")
    return earlier[name]


def _check_references(
    stage: StageRecipe, earlier: dict[str, StageRecipe], pretrained: dict[str, PretrainedRecipe], path: str
) -> None:
    keys = set(stage.from_)
    allowed: list[set[str]] = [{"model"}]
    allowed.append({"encoder", "decoder"} if stage.kind == "memory" else set())
    if keys not in allowed:
        expected = "encoder and decoder, or model" if stage.kind == "memory" else "model, or nothing"
        raise ValueError(f"{path}.from has the keys {sorted(keys)}, expected {expected}")
    for key, name in stage.from_.items():
        kinds = {"model": (stage.kind,), "encoder": ("autoencoder", "causal_lm"), "decoder": ("causal_lm",)}[key]
        if name in pretrained:
            continue
        _check_reference(name, kinds, earlier, f"{path}.from.{key}")
    _check_reference(
        stage.warm_start.tables_from, ("autoencoder", "causal_lm"), earlier, f"{path}.warm_start.tables_from"
    )
    if stage.kind != "memory" and stage.adapters:
        raise ValueError(f"{path}.adapters are for memory stages; a stage of kind {stage.kind} has none")
    if not stage.from_ and not stage.model:
        raise ValueError(f"{path} has neither model nor from: describe a new model or name the stage it continues")
    if "model" in stage.from_ and set(stage.model) - CHANGEABLE:
        raise ValueError(
            f"{path}.model is {json.dumps(stage.model)}, but a continued stage keeps its model: only freeze_encoder, "
            "freeze_decoder, encoder_trained_from and memories_per_chunk may change; remove the rest"
        )


def _check_once(stage: StageRecipe, recipe: Recipe, path: str) -> None:
    """Check what an encoder needs that reads its text once, or with a tokenizer of its own."""
    streaming, slots = recipe.data.streaming, stage.data.layout == "slots"
    if recipe.encoder_of(stage) is None:
        if stage.data.encode_once:
            raise ValueError(
                f"{path}.data.encode_once is for memory stages whose encoder has a tokenizer of its own; leave it out"
            )
        return
    if streaming:
        raise ValueError(f"{path}: an encoder with a tokenizer of its own reads whole documents, not data.streaming")
    if not slots:
        raise ValueError(
            f"{path}: the encoder has a tokenizer of its own, so the text of memories and the decoder's are different "
            "tokens; set data.layout: slots"
        )


def _check_budgets(stage: StageRecipe, recipe: Recipe, path: str) -> None:
    rows, slots = stage.data, stage.kind == "memory" and stage.data.layout == "slots"
    if rows.num_memories and not slots:
        raise ValueError(f"{path}.data.num_memories is for memory stages with data.layout: slots")
    weights = rows.num_memories_weights
    if weights and (len(weights) != len(rows.num_memories) or min(weights) < 0 or not sum(weights)):
        raise ValueError(
            f"{path}.data.num_memories_weights is {weights}; expected a weight of 0 or more for each of the "
            f"{len(rows.num_memories)} num_memories, not all of them 0"
        )


def _check_asked(stage: StageRecipe, path: str) -> None:
    """Check what qa and distillation of it need."""
    rows, training = stage.data, stage.training
    asks = "qa" in stage.objectives or ("distillation" in stage.objectives and rows.taught == "qa")
    if asks and (not rows.questions or rows.layout != "slots"):
        raise ValueError(f"{path}.objectives.qa needs files in data.questions, and data.layout: slots")
    if rows.questions and not asks:
        raise ValueError(f"{path}.data.questions are for the objective qa, or distillation of it; leave them out")
    if asks and training.eval_steps and not rows.validation_questions:
        raise ValueError(
            f"{path}.data.validation_questions is empty, but training.eval_steps is {training.eval_steps}; name files "
            "with other questions, or leave eval_steps out"
        )


def _check_distillation(stage: StageRecipe, path: str) -> None:
    training = stage.training
    slots = stage.kind == "memory" and stage.data.layout == "slots"
    if "distillation" in stage.objectives and (not slots or training.loss_chunk is not None):
        raise ValueError(
            f"{path}.objectives.distillation compares with the decoder on the whole text: it needs data.layout: slots "
            "and no training.loss_chunk"
        )
    if training.distillation_temperature <= 0:
        raise ValueError(
            f"{path}.training.distillation_temperature is {training.distillation_temperature}, expected above 0"
        )
    for depth in training.distillation_depths:
        if not 0 < depth <= 1:
            raise ValueError(
                f"{path}.training.distillation_depths holds {depth}; depths are shares of the decoder's layers, above "
                "0 and up to 1"
            )
    if training.distillation_states_weight < 0:
        raise ValueError(
            f"{path}.training.distillation_states_weight is {training.distillation_states_weight}, expected 0 or more"
        )


def _check_objectives(stage: StageRecipe, path: str) -> None:
    known = STAGE_OBJECTIVES[stage.kind]
    if stage.kind == "memory" and not stage.objectives:
        raise ValueError(f"{path}.objectives is empty; name objectives and weights, e.g. {{causal: 1.0, copy: 0.5}}")
    for name, weight in stage.objectives.items():
        if name not in known:
            close = nearest(name, list(known))
            raise ValueError(
                f"{path}.objectives.{name} is no objective of a stage of kind {stage.kind}{close}; known: "
                f"{', '.join(known)}"
            )
        if weight <= 0:
            raise ValueError(
                f"{path}.objectives.{name} is {weight}; a weight must be above 0: remove the line instead"
            )


def _check_training(training: TrainingRecipe, path: str) -> None:
    if training.num_workers < 0:
        raise ValueError(f"{path}.training.num_workers is {training.num_workers}, expected 0 or more")
    if training.learning_rate < 0 or training.muon_learning_rate < 0:
        raise ValueError(f"{path}.training has a negative learning rate; give 0 or more")
    if training.warmup < 0 or training.decay < 0 or training.warmup + training.decay > 1:
        raise ValueError(
            f"{path}.training.warmup {training.warmup} + decay {training.decay}: both are fractions of the steps, not "
            "negative, and together at most 1"
        )
    for pattern in training.lr_multipliers:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"{path}.training.lr_multipliers: {pattern!r} is no regular expression: {error}"
            ) from error


def _check_rows(stage: StageRecipe, path: str) -> None:
    rows, batch_size = stage.data, stage.training.batch_size
    for name, step in rows.every.items():
        if name not in stage.objectives:
            raise ValueError(
                f"{path}.data.every.{name}: the stage has no such objective{nearest(name, list(stage.objectives))}; "
                f"it has {', '.join(stage.objectives) or 'its only one, which takes all rows'}"
            )
        if step < 1 or batch_size % step:
            raise ValueError(
                f"{path}.data.every.{name} is {step}, but must divide training.batch_size {batch_size}, so that the "
                "rows do not depend on the number of processes"
            )
    if rows.source_length is not None and rows.source_length > rows.row_length:
        raise ValueError(f"{path}.data.source_length {rows.source_length} exceeds row_length {rows.row_length}")
    if rows.window_length is None:
        return
    if stage.kind != "causal_lm":
        raise ValueError(f"{path}.data.window_length is for causal_lm stages; a memory model has model.window_length")
    if rows.row_length % rows.window_length:
        raise ValueError(
            f"{path}.data.row_length {rows.row_length} is no multiple of window_length {rows.window_length}"
        )


def _check_documents(stage: StageRecipe, path: str, *, streaming: bool) -> None:
    rows, training = stage.data, stage.training
    others = {
        "data.streaming": streaming,
        "data.encode_once": rows.encode_once,
        "data.vary_source": rows.vary_source,
        "data.window_length": rows.window_length is not None,
    }
    wrong = [name for name, is_set in others.items() if is_set]
    if rows.documents and wrong:
        raise ValueError(f"{path}.data.documents does not go together with {' and '.join(wrong)}; leave one out")
    if training.group_by_length and not rows.documents:
        raise ValueError(
            f"{path}.training.group_by_length needs rows of different lengths; set data.documents: true, or leave it "
            "out"
        )
    if training.watch_steps is not None and stage.kind != "memory":
        raise ValueError(f"{path}.training.watch_steps looks at memories, which a {stage.kind} stage has none of")


def _check_shortened(stage: StageRecipe, recipe: Recipe, path: str) -> None:
    rows = stage.data
    for name in ("shortened", "random_tokens"):
        share = getattr(rows, name)
        if not 0 <= share <= 1:
            raise ValueError(f"{path}.data.{name} is {share}; it is a share: expected 0 to 1")
        if share:
            _check_changed(stage, recipe, f"{path}.data.{name}")


def _check_changed(stage: StageRecipe, recipe: Recipe, path: str) -> None:
    """Refuse rows that are cut or have random tokens where that cannot be."""
    rows = stage.data
    copies = {"copy", "blank_copy"} & set(stage.objectives)
    in_slots = stage.kind == "memory" and rows.layout == "slots" and rows.marker == "token" and copies
    if stage.kind != "autoencoder" and not in_slots:
        raise ValueError(
            f"{path} is for autoencoder stages and for copies with a marker in data.layout: slots; leave it out"
        )
    others = {
        "data.documents": rows.documents,
        "data.vary_source": rows.vary_source,
        "an encoder with a tokenizer of its own": recipe.encoder_of(stage) is not None,
    }
    wrong = [name for name, is_set in others.items() if is_set]
    if wrong:
        raise ValueError(f"{path} does not go together with {' and '.join(wrong)}; leave one out")


def _check_positive(value: int | None, path: str) -> None:
    if value is not None and value < 1:
        raise ValueError(f"{path} is {value}, expected 1 or more")
