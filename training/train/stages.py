"""One stage of a recipe, from its model to its folder; killed anywhere, it goes on from its last checkpoint.

A stage's folder holds `started.json` (what it is training), `checkpoints/`, and once it is done `model/` and
`stage.json`. Each is written beside its place and renamed, so that what is there is whole.
"""

import contextlib
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from modeling_memory import MemoryAutoencoder, MemoryEncoderDecoderForCausalLM, MemoryProcessor

from ..data.documents import DocumentRows
from ..data.making import MAKERS, make_questions, save_questions
from ..data.objectives import IGNORED, BatchSpec, targets_of
from ..data.pairs import PairCollator, PairedRows, PairedText, cached_pairs, encode_pairs
from ..data.questions import Question, Questions, RowsWithQuestions, read_questions
from ..data.rows import ObjectiveCollator, TokenRows
from ..data.token_stream import StreamedRows
from ..recipes.recipe import (
    STAGE_OBJECTIVES,
    Recipe,
    StageRecipe,
    refers_to_bases,
    resolve_documents,
    resolve_files,
)
from ..records.record import data_digest, peak_memory_bytes, read_json, write_json
from .build import build_stage_model, check_described, count_parameters, parameter_report, report_lines
from .checkpoints import check_same, last_complete_checkpoint, replace_folder
from .inputs import Inputs
from .stopping import StoppedError
from .trainer import MemoryTrainer, training_arguments
from .warm_start import FITTED_CHUNKS, start_projector
from .watching import WatchMemories

WATCHED_TEXTS = 16
# Settings of a stage that its weights do not depend on: who reads rows, what is written when, who looks on.
WITHOUT_EFFECT = (
    "num_workers",
    "watch_steps",
    "logging_steps",
    "eval_steps",
    "eval_rows",
    "save_steps",
    "save_total_limit",
)
MODEL_CLASSES = {
    "autoencoder": MemoryAutoencoder,
    "causal_lm": AutoModelForCausalLM,
    "memory": MemoryEncoderDecoderForCausalLM,
}


class StageRunner:
    """Trains the stages of a recipe into `folder`.

    Args:
        recipe (`Recipe`): The recipe.
        folder (`Path`): Where each stage gets a folder of its name.
        inputs (`Inputs`): Tokenizer and text; a stage trained on others is not continued.
    """

    def __init__(self, recipe: Recipe, folder: Path, inputs: Inputs) -> None:
        self.recipe = recipe
        self.folder = folder
        self.inputs = inputs
        self.tokenizer = inputs.tokenizer
        self.special_tokens = inputs.special_tokens
        self._pairs: dict[tuple[str, str, int], PairedText] = {}
        self.stopped = False
        self.state = PartialState(cpu=recipe.use_cpu)

    @property
    def vocab_size(self) -> int:
        """Rows of the models' token tables: the slot's id lies just after them."""
        memory = self.special_tokens.memory
        return len(self.tokenizer) if memory is None else min(memory, len(self.tokenizer))

    def load(self, name: str, **options: Any) -> Any:
        """Load the model of a finished stage, or a pretrained one; options are those of `from_pretrained`."""
        source = self.recipe.pretrained.get(name)
        if source is not None:
            slim = refers_to_bases(source)
            # Bases are known again by their hash, which another dtype would change; only what is trained is cast.
            dtype = "auto" if slim else torch.float32
            model = AutoModelForCausalLM.from_pretrained(source.source, dtype=dtype, **source.options)
            for parameter in model.parameters():
                if slim and parameter.requires_grad:
                    parameter.data = parameter.data.float()
            check_described(source, model.config, name)
            return model
        kind = self.recipe.stage(name).kind
        return MODEL_CLASSES[kind].from_pretrained(self.folder / name / "model", **options)

    def load_part(self, name: str) -> Any:
        """Load the model of a finished stage; a pretrained one is named, and loaded by whoever joins it."""
        return self.recipe.pretrained.get(name) or self.load(name)

    def finished(self, stage: StageRecipe) -> dict[str, Any] | None:
        """Return the record entry of a stage that is done, else `None`.

        Raises:
            ValueError: If the stage's folder was begun with other settings, text or sources.
        """
        folder = self.folder / stage.name
        check_same(read_json(folder / "started.json"), self.identity(stage), folder)
        return read_json(folder / "stage.json")

    def run(self, stage: StageRecipe) -> dict[str, Any]:
        """Train a stage, from its last checkpoint if there is one; return its entry for the record."""
        folder = self.folder / stage.name
        if self.state.is_main_process:
            write_json(folder / "started.json", self.identity(stage))
        self.state.wait_for_everyone()
        result = self._train(stage, folder)
        if self.state.is_main_process:
            write_json(folder / "stage.json", result)
        self.state.wait_for_everyone()
        if self.stopped:
            raise StoppedError(f"stopped by SIGTERM; stage {stage.name} is done; rerun the same command to resume")
        return result

    def identity(self, stage: StageRecipe) -> dict[str, Any]:
        """Everything that decides what a stage's weights become, and nothing else: the rest may change on the way."""
        mapping = self.recipe.to_mapping()
        index = [other.name for other in self.recipe.stages].index(stage.name)
        sources = {*stage.from_.values(), *filter(None, [stage.warm_start.tables_from])}
        for key in WITHOUT_EFFECT:
            del mapping["stages"][index]["training"][key]
        return {
            "stage": mapping["stages"][index],
            "seed": self.recipe.seed + index,
            "inputs": self.inputs.fingerprint,
            "processes": self.state.num_processes,
            "after": {
                name: data_digest(
                    mapping["pretrained"][name]
                    if name in self.recipe.pretrained
                    else self.identity(self.recipe.stage(name))
                )
                for name in sorted(sources)
            },
        }

    def _train(self, stage: StageRecipe, folder: Path) -> dict[str, Any]:
        training = stage.training
        objectives = dict(stage.objectives) or {STAGE_OBJECTIVES[stage.kind][0]: 1.0}
        seed = self._seed(stage)
        set_seed(seed)
        load = self.load_part if "model" not in stage.from_ else self.load
        model = build_stage_model(stage, special_tokens=self.special_tokens, vocab_size=self.vocab_size, load=load)
        report = parameter_report(model)
        if self.state.is_main_process:
            print("\n".join(report_lines(report)), flush=True)
        collator, train_rows, validation_rows = self._data(stage, model, list(objectives))
        # A checkpoint brings its own projector.
        if stage.kind == "memory" and "model" not in stage.from_ and self._checkpoint(folder / "checkpoints") is None:
            self._start_projector(stage, model, collator)
        # Before the first step: a layout that does not fit says so here.
        first_batch = collator([train_rows[i] for i in range(training.batch_size)])
        if training.attention is not None:
            model.set_attn_implementation(training.attention)
        options: dict[str, Any] = {"seed": seed, "use_cpu": self.recipe.use_cpu, "report_to": self.recipe.report_to}
        trainer = MemoryTrainer(
            model,
            training_arguments(training, folder / "checkpoints", **options),
            objectives=objectives,
            training=training,
            train_dataset=train_rows,
            eval_dataset=validation_rows,
            data_collator=collator,
            label=stage.name,
        )
        clock = self._run_trainer(trainer, stage, folder)
        if self.state.is_main_process:
            self._save(trainer.accelerator.unwrap_model(trainer.model), stage, folder / "model")
        return {
            "kind": stage.kind,
            "objectives": objectives,
            "seed": seed,
            "parameters": count_parameters(model),
            "parameters_by_part": report,
            **self._spent(stage, train_rows, first_batch, list(objectives), clock),
            "series": [
                {key: value for key, value in log.items() if isinstance(value, int | float)}
                for log in trainer.state.log_history
            ],
        }

    def _seed(self, stage: StageRecipe) -> int:
        return self.recipe.seed + [other.name for other in self.recipe.stages].index(stage.name)

    def _step_rows(self, stage: StageRecipe) -> int:
        """Rows of one optimizer step, on all processes together."""
        return stage.training.batch_size * stage.training.gradient_accumulation_steps * self.state.num_processes

    def _order(self, stage: StageRecipe) -> int:
        """Seed of the order in which a stage reads its rows."""
        return self._seed(stage) if stage.data.seed is None else stage.data.seed

    def _data(self, stage: StageRecipe, model: PreTrainedModel, objectives: list[str]) -> tuple[Any, Any, Any]:
        """Build a stage's collator, its training rows and, if it is to be evaluated, its validation rows."""
        collator, rows = self._collator(stage, model, objectives), stage.data
        step_rows, order = self._step_rows(stage), self._order(stage)
        train: Any = self._train_rows(stage, model, stage.training.max_steps * step_rows, order, step_rows=step_rows)
        validation: Any = self._validation_rows(stage, model) if stage.training.eval_steps else None
        if isinstance(collator, PairCollator):
            collator.encoded = self._encoded_pairs(stage, model, train.text)
        if rows.questions:
            asked = self._questions(stage, "questions", "train")
            held_out = self._questions(stage, "validation_questions", "validation")
            processor = processor_for(model, self.tokenizer, self.encoder_tokenizer(stage))
            collator.questions = Questions([*asked, *held_out], processor, model.config.max_memories)
            train = RowsWithQuestions(train, 0, len(asked), order)
            validation = validation and RowsWithQuestions(validation, len(asked), len(held_out))
        return collator, train, validation

    def _questions(self, stage: StageRecipe, key: str, split: str) -> list[Question]:
        """Read a stage's questions; those that the recipe asks to be made are made once, of a split of the run."""
        path, files = f"stages.{stage.name}.data.{key}", []
        for number, name in enumerate(getattr(stage.data, key)):
            kind, _, count = name.partition(":")
            if kind not in MAKERS:
                files += resolve_files([name], path)
                continue
            if not count.isdecimal() or not int(count):
                raise ValueError(f"{path} holds {name!r}; expected {kind}:N with N of 1 or more, or a file")
            file = self.folder / stage.name / f"{key}_{number}.jsonl"
            with self.state.main_process_first():
                if not file.is_file():
                    data = self.recipe.data
                    documents = resolve_documents(getattr(data, split), data.text_column, f"data.{split}")
                    seed = self.recipe.seed + number
                    save_questions(make_questions(list(documents.read()), int(count), seed, kind), file)
            files.append(file)
        return read_questions(files) if files else []

    def _start_projector(self, stage: StageRecipe, model: PreTrainedModel, collator: Any) -> None:
        """Let a fresh projector start where the recipe says."""
        where = f"stages.{stage.name}.warm_start"
        sample: list[tuple[Any, ...]] = []
        if stage.warm_start.projector in ("last_token", "fitted"):
            if isinstance(collator, PairCollator):
                raise ValueError(
                    f"{where}.projector is {stage.warm_start.projector}, but the encoder has a tokenizer of its own, "
                    "whose tokens are none of the decoder's; use default"
                )
            number = -(-FITTED_CHUNKS * model.config.chunk_length // stage.data.row_length)
            if stage.warm_start.projector == "fitted":
                number = stage.warm_start.fitted_rows
            fitted = self._train_rows(stage, model, number, self._order(stage))
            sample = [fitted[i] for i in range(number)]
        shares = start_projector(model, stage.warm_start, sample, where)
        if shares and self.state.is_main_process:
            told = ", ".join(f"{share:.0%} of the variance of {name}" for name, share in shares.items())
            print(f"the full text's, explained at memories before any training: {told}", flush=True)

    def _run_trainer(self, trainer: MemoryTrainer, stage: StageRecipe, folder: Path) -> "StageClock":
        """Train from the last checkpoint on, if there is one."""
        checkpoint = self._checkpoint(folder / "checkpoints")
        resumed_at = 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])
        clock = StageClock(folder / "sessions.json", resumed_at, keeps=self.state.is_main_process)
        trainer.add_callback(clock)
        watch_steps, max_steps = stage.training.watch_steps, stage.training.max_steps
        if watch_steps is not None:
            trainer.add_callback(WatchMemories(trainer, self._watched_texts(stage, trainer.model), watch_steps))
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        clock.keep(trainer.state.global_step)
        self.stopped = trainer.stopped
        if trainer.stopped and trainer.state.global_step < max_steps:
            raise StoppedError(
                f"stopped by SIGTERM in stage {stage.name} after step {trainer.state.global_step} of "
                f"{max_steps}, with a checkpoint; rerun the same command to resume"
            )
        return clock

    def _spent(
        self, stage: StageRecipe, train_rows: Any, first_batch: Mapping[str, Any], objectives: list[str], clock: Any
    ) -> dict[str, Any]:
        """Count what a stage has read and how long it took."""
        num_rows = stage.training.max_steps * self._step_rows(stage)
        num_targets = {
            name: int((targets_of(first_batch[name]) != IGNORED).sum()) * num_rows // stage.training.batch_size
            for name in objectives
        }
        documents = isinstance(train_rows, DocumentRows)
        uneven = documents or stage.data.shortened > 0 or bool(stage.data.questions)
        num_tokens = train_rows.num_tokens() if documents else num_rows * train_rows.row_length
        return {
            "steps": stage.training.max_steps,
            "rows": num_rows,
            "text_tokens": num_tokens,
            "targets": None if uneven else num_targets,
            "seconds": round(clock.seconds, 2),
            "sessions": clock.sessions,
            "resumed_at_step": clock.resumed_at,
            "text_tokens_per_second": round(num_tokens / max(clock.seconds, 1e-9), 1),
            "peak_memory_bytes": peak_memory_bytes(),
        }

    def _checkpoint(self, folder: Path) -> Path | None:
        """Find the checkpoint to go on from; the main process looks, and all take the same."""
        found: list[str | None] = [None]
        if self.state.is_main_process:
            checkpoint = last_complete_checkpoint(folder, say=lambda text: print(f"warning: {text}", file=sys.stderr))
            found = [None if checkpoint is None else str(checkpoint)]
        broadcast_object_list(found)
        return None if found[0] is None else Path(found[0])

    def pair_collator(self, stage: StageRecipe, model: PreTrainedModel, objectives: list[str]) -> "PairCollator":
        """Build the collator of a stage whose encoder has a tokenizer of its own."""
        spec = self._spec(stage, chunk_length=1, window_length=1, memories_per_chunk=model.config.memories_per_chunk)
        return PairCollator(objectives, spec, source_chunks=chunk_counts(stage, model.config.chunk_length)[0])

    def _spec(
        self, stage: StageRecipe, *, chunk_length: int, window_length: int, memories_per_chunk: int
    ) -> BatchSpec:
        """How the batches of a stage are made."""
        rows = stage.data
        return BatchSpec(
            self.special_tokens,
            chunk_length=chunk_length,
            window_length=window_length,
            memories_per_chunk=memories_per_chunk,
            source_length=rows.source_length,
            vary_source=rows.vary_source,
            shortened=rows.shortened,
            random_tokens=rows.random_tokens,
            vocab_size=len(self.inputs.tokenizer),
            documents=rows.documents,
            split_windows=rows.window_length is not None,
            every=rows.every,
            num_memories=rows.num_memories,
            num_memories_weights=rows.num_memories_weights,
            begin=rows.begin,
            recall_prompt=rows.recall_prompt,
            recall_length=rows.recall_length,
            taught=rows.taught,
            layout=rows.layout,
            marker=rows.marker,
        )

    def paired_text(self, stage: StageRecipe, model: PreTrainedModel, split: str) -> PairedText:
        """Return a split in the tokens of a stage's encoder and decoder."""
        source = self.recipe.encoder_of(stage)
        assert source is not None
        key = split, source.path, model.config.chunk_length
        if key not in self._pairs:
            processor = processor_for(model, self.tokenizer, self.encoder_tokenizer(stage))
            limit = self.recipe.data.max_train_tokens if split == "train" else None
            with self.state.main_process_first():
                folder = Path(self.recipe.data.cache_dir or self.folder.parent / "inputs")
                paired = cached_pairs(processor, self.inputs.texts[split], folder, limit=limit)
            self._pairs[key] = paired.first(limit)
        return self._pairs[key]

    def encoder_tokenizer(self, stage: StageRecipe) -> PreTrainedTokenizerBase | None:
        """Load the tokenizer of a stage's encoder, if it is not the run's."""
        source = self.recipe.encoder_of(stage)
        return None if source is None else AutoTokenizer.from_pretrained(source.source, **source.options)

    def _encoded_pairs(
        self, stage: StageRecipe, model: PreTrainedModel, text: PairedText
    ) -> tuple[PairedText, Any] | None:
        if not stage.data.encode_once:
            return None
        folder = Path(self.recipe.data.cache_dir or self.folder / "encoded")
        with self.state.main_process_first():
            bf16 = stage.training.bf16
            return text, encode_pairs(model, text, folder, bf16=bf16, device=self.state.device)

    def _collator(
        self, stage: StageRecipe, model: PreTrainedModel, objectives: list[str]
    ) -> "ObjectiveCollator | PairCollator":
        rows, config = stage.data, model.config
        per_chunk = getattr(config, "memories_per_chunk", 1)
        if max(rows.num_memories, default=1) > per_chunk:
            raise ValueError(
                f"stages.{stage.name}.data.num_memories is {max(rows.num_memories)} at most, but the model has "
                f"memories_per_chunk {per_chunk}; expected 1 to {per_chunk}"
            )
        if self.recipe.encoder_of(stage) is not None:
            return self.pair_collator(stage, model, objectives)
        window_length = getattr(config, "window_length", None) or rows.window_length or rows.row_length
        chunk_length = getattr(config, "chunk_length", window_length)
        if rows.vary_source:
            lengths = max(1, (rows.source_length or rows.row_length) // window_length)
            step = math.lcm(*(rows.every.get(name, 1) for name in objectives))
            if stage.training.batch_size % (lengths * step):
                raise ValueError(
                    f"stages.{stage.name}.data.vary_source gives {lengths} lengths of source in turn, so "
                    f"training.batch_size must be a multiple of {lengths * step}; it is {stage.training.batch_size}"
                )
        spec = self._spec(
            stage,
            chunk_length=chunk_length,
            window_length=chunk_length if stage.kind == "autoencoder" else window_length,
            memories_per_chunk=per_chunk,
        )
        return ObjectiveCollator(objectives, spec)

    def _train_rows(
        self, stage: StageRecipe, model: PreTrainedModel, num_items: int, seed: int, *, step_rows: int | None = None
    ) -> TokenRows | DocumentRows | StreamedRows | PairedRows:
        if self.recipe.encoder_of(stage) is not None:
            text = self.paired_text(stage, model, "train")
            chunks_per_row = chunk_counts(stage, text.chunk_length)[1]
            return PairedRows(text, chunks_per_row=chunks_per_row, num_items=num_items, seed=seed)
        length, stream = stage.data.row_length, self.inputs.stream
        if stream is not None:
            shuffle_rows = self.recipe.data.shuffle_rows
            return StreamedRows(stream, row_length=length, num_items=num_items, seed=seed, shuffle_rows=shuffle_rows)
        tokens = self.inputs.tokens["train"]
        if stage.data.documents and step_rows is not None:  # a sample for the projector may be packed
            eos = self.special_tokens.require("eos", "data.documents")
            # A window to copy and a token after it; the other stages only need a token that predicts another.
            shortest = model.config.window_length + 1 if stage.kind == "memory" else 2
            return DocumentRows(
                tokens,
                eos_token_id=eos,
                row_length=length,
                shortest=shortest,
                num_items=num_items,
                step_rows=step_rows,
                seed=seed,
                group_by_length=stage.training.group_by_length,
            )
        return TokenRows(tokens, row_length=length, num_items=num_items, seed=seed)

    def _validation_rows(self, stage: StageRecipe, model: PreTrainedModel) -> TokenRows | PairedRows:
        if self.recipe.encoder_of(stage) is not None:
            text = self.paired_text(stage, model, "validation")
            chunks_per_row = chunk_counts(stage, text.chunk_length)[1]
            num_items = min(stage.training.eval_rows, text.num_chunks // chunks_per_row)
            return PairedRows(text, chunks_per_row=chunks_per_row, num_items=num_items)
        training, length = stage.training, stage.data.row_length
        tokens = self.inputs.tokens["validation"][: training.eval_rows * length]
        return TokenRows(tokens, row_length=length, num_items=tokens.numel() // length)

    def _watched_texts(self, stage: StageRecipe, model: PreTrainedModel) -> torch.Tensor:
        """Return the first validation texts, as long as the stage's rows and at least two windows, `(B, n)`."""
        length, tokens = max(stage.data.row_length, 2 * model.config.window_length), self.inputs.tokens["validation"]
        num_texts = min(WATCHED_TEXTS, tokens.numel() // length)
        if not num_texts:
            raise ValueError(
                f"training.watch_steps looks at texts of {length} tokens of the validation split, which has only "
                f"{self.inputs.tokens['validation'].numel()}; give more text or leave it out"
            )
        return tokens[: num_texts * length].view(num_texts, length).long()

    def _save(self, model: PreTrainedModel, stage: StageRecipe, folder: Path) -> None:
        """Write the finished model with its tokenizer or processor, empty folder first."""
        replace_folder(folder, lambda part: self._write(model, stage, part))

    def _write(self, model: PreTrainedModel, stage: StageRecipe, folder: Path) -> None:
        if stage.kind == "memory":
            model.save_pretrained(folder, by_reference=self.recipe.publish.by_reference)
            processor_for(model, self.tokenizer, self.encoder_tokenizer(stage)).save_pretrained(folder)
        else:
            model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)


class StageClock(TrainerCallback):
    """Seconds of a stage over all its sessions, also of those that were killed, up to their last log.

    Args:
        path (`Path`): One entry a session: the step it began at, the last step it logged, its seconds.
        resumed_at (`int`): The step that this session begins at.
        keeps (`bool`): Whether this process writes the file.
    """

    def __init__(self, path: Path, resumed_at: int, *, keeps: bool) -> None:
        self.path = path
        self.keeps = keeps
        self.earlier: list[dict[str, Any]] = read_json(path) or []
        self.resumed_at = resumed_at
        self.started = time.perf_counter()

    @property
    def sessions(self) -> int:
        """Sessions so far, this one included."""
        return len(self.earlier) + 1

    @property
    def seconds(self) -> float:
        """Seconds of all sessions so far."""
        return sum(entry["seconds"] for entry in self.earlier) + time.perf_counter() - self.started

    def keep(self, step: int) -> None:
        """Write down how long this session has taken; a full disk is no reason to stop."""
        entry = {
            "from_step": self.resumed_at,
            "to_step": step,
            "seconds": round(time.perf_counter() - self.started, 3),
        }
        if self.keeps:
            with contextlib.suppress(OSError):
                write_json(self.path, [*self.earlier, entry])

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Keep the time at each log."""
        self.keep(state.global_step)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Keep the time with each checkpoint."""
        self.keep(state.global_step)


def chunk_counts(stage: StageRecipe, chunk_length: int) -> tuple[int, int]:
    """Return the chunks that become memories, and those of a row, for an encoder with its own tokenizer.

    Raises:
        ValueError: If lengths are no whole chunks, or nothing is left to read after the source.
    """
    rows = stage.data
    source = rows.source_length or rows.row_length // 2
    if source % chunk_length or rows.row_length % chunk_length or not 0 < source < rows.row_length:
        raise ValueError(
            f"stages.{stage.name}.data: row_length is {rows.row_length} and source_length {source}; with an encoder "
            f"that has its own tokenizer both are whole chunks of {chunk_length}, the source shorter than the row"
        )
    return source // chunk_length, rows.row_length // chunk_length


def processor_for(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    encoder_tokenizer: PreTrainedTokenizerBase | None = None,
) -> MemoryProcessor:
    """Build the processor of a memory model, with the encoder's tokenizer if it has one of its own."""
    config = model.config
    return MemoryProcessor(
        tokenizer,
        encoder_tokenizer,
        chunk_length=config.chunk_length,
        window_length=config.window_length,
        memories_per_chunk=config.memories_per_chunk,
        memory_token=tokenizer.convert_ids_to_tokens(config.memory_token_id),
    )
