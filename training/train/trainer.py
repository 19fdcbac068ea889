"""Trainer of several objectives at once, with exact sums for every number it logs.

One step's loss is `sum_o weight_o * (sum of the token losses of o) / (number of targets of o)`, where both sums run
over the *global* batch: all accumulation steps and all processes. So one process, two processes and accumulation
give the same gradients, whatever their label counts. Token accuracies and per-objective losses are logged from the
same kind of sums, never as means of batch means.
"""

import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from ..data.documents import DocumentRows
from ..data.objectives import IGNORED, combine_losses, distillation_loss, states_loss, targets_of
from ..data.rows import TokenRows
from ..data.token_stream import StreamedRows
from ..recipes.recipe import TrainingRecipe
from ..records.record import peak_memory_bytes
from .checkpoints import (
    PART,
    WRITE_ERRORS,
    commit,
    frozen_names,
    last_complete_checkpoint,
    rotate,
    save_split,
)
from .chunked_loss import check_head, chunked_cross_entropy, without_head
from .optimizer import build_optimizer
from .stopping import StopSignal

SCHEDULES = {
    "warmup_stable_decay": "warmup_stable_decay",
    "linear": "linear",
    "cosine": "cosine",
    "constant": "constant_with_warmup",
}


class NonFiniteLossError(RuntimeError):
    """The loss, or a weight about to be saved, is not a finite number."""

    exit_status = 1


@dataclass(frozen=True)
class Teaching:
    """What distillation compares.

    Attributes:
        temperature (`float`): Softens the distributions of both sides.
        depths (`Sequence[float]`): Layers whose states are compared too, as shares of the decoder's depth: 1 is the
            last one.
        states_weight (`float`): Weight of the states beside the distributions.
    """

    temperature: float = 1.0
    depths: Sequence[float] = ()
    states_weight: float = 1.0

    def states_of(self, outputs: Any, kept: torch.Tensor) -> list[torch.Tensor]:
        """Return the states `(N, D)` of a model's outputs at the depths, where `kept` `(B, T)` holds."""
        if not self.depths:
            return []
        layers = len(outputs.hidden_states) - 1  # the first entry is the token embeddings
        return [outputs.hidden_states[max(1, round(depth * layers))][kept] for depth in self.depths]


def run_objective(
    model: nn.Module, batch: Mapping[str, torch.Tensor], *, teaching: Teaching | None = None, **kwargs: Any
) -> Any:
    """Run a model on the batch of one objective.

    A batch with `teacher_input_ids` is one of distillation: the loss is the divergence from the decoder itself, its
    adapters off, that reads the full text, and at some depths the distance of its states. The teacher is in eval mode
    and takes no gradient.

    Args:
        model (`nn.Module`): The model, possibly wrapped for several processes.
        batch (`Mapping`): As made by the collator; `shift_labels` `(B, T)` or unshifted `labels` `(B, L)`,
            and optionally `columns`, the columns that have a target in some row.
        teaching (`Teaching`, *optional*): What distillation compares.
        kwargs: Further arguments of the model's `forward`.

    Returns:
        The sum of the token losses (a scalar with gradient), the logits `(B, columns, V)` and their targets.
    """
    own = model.module if hasattr(model, "module") else model
    inputs = model_inputs(own, batch)
    if "labels" in batch:
        outputs = model(**inputs, labels=batch["labels"], num_items_in_batch=1, **kwargs)
        return outputs.loss, outputs.logits, batch["labels"]
    targets = batch["shift_labels"]
    if "columns" in batch:
        targets = targets[:, batch["columns"]]
        kwargs["logits_to_keep"] = batch["columns"]
    if "teacher_input_ids" in batch:
        teaching = teaching or Teaching()
        teacher, teacher_states = teacher_says(own, batch, teaching)
        if teaching.depths:
            kwargs["output_hidden_states"] = True
        outputs = model(**inputs, use_cache=False, **kwargs)
        loss = distillation_loss(outputs.logits[targets != IGNORED], teacher, teaching.temperature)
        states = teaching.states_of(outputs, batch["shift_labels"] != IGNORED)
        for own_states, other in zip(states, teacher_states, strict=True):
            loss = loss + teaching.states_weight / len(states) * states_loss(own_states, other)
        return loss, outputs.logits, targets
    logits = model(**inputs, use_cache=False, **kwargs).logits
    loss = own.loss_function(
        logits=logits, labels=None, vocab_size=logits.shape[-1], shift_labels=targets, num_items_in_batch=1
    )
    return loss, logits, targets


@torch.no_grad()
def teacher_says(
    model: nn.Module, batch: Mapping[str, torch.Tensor], teaching: Teaching
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Ask a memory model's decoder, as it was before its adapters, about the targets, with the full text before it.

    Args:
        model (`MemoryEncoderDecoderForCausalLM`): The model.
        batch (`Mapping`): With `teacher_input_ids`, `teacher_attention_mask` and `teacher_labels`, each `(B, T')`.
        teaching (`Teaching`): What is compared.

    Returns:
        Logits `(N, V)`, and states `(N, D)` for each depth.
    """
    was_training = model.decoder.training
    with model.adapters_off():
        model.decoder.eval()
        outputs = model.decoder(
            input_ids=batch["teacher_input_ids"],
            attention_mask=batch["teacher_attention_mask"],
            use_cache=False,
            output_hidden_states=bool(teaching.depths),
        )
    model.decoder.train(was_training)
    model.train(model.training)  # frozen parts and adapters as they belong
    asked = batch["teacher_labels"] != IGNORED
    return outputs.logits[asked], teaching.states_of(outputs, asked)


def model_inputs(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Return the arguments of a model's `forward` in a batch; ready encoder states are projected to memories."""
    inputs = {
        name: tensor
        for name, tensor in batch.items()
        if name not in ("shift_labels", "columns", "labels") and not name.startswith("teacher_")
    }
    if "token_states" in inputs:
        inputs["memory_embeds"] = _memories_of_states(
            model, inputs.pop("token_states"), inputs.pop("context_attention_mask"),
            inputs.pop("context_num_memories", None),
        )  # fmt: skip
    return inputs


def _memories_of_states(
    model: nn.Module, states: torch.Tensor, mask: torch.Tensor, num_memories: torch.Tensor | None
) -> torch.Tensor:
    """Pool and project ready token states `(B, C, L, E)`, with an equal budget for all chunks; `(B, C * K, D)`."""
    counts = None if num_memories is None else num_memories.flatten()
    pooled = model.pooling(states.flatten(0, 1), mask.flatten(0, 1), counts)  # (B * C, K, E)
    if counts is not None:
        pooled = pooled[:, : int(counts[0])]
    return model.projector(pooled.to(model.decoder.dtype)).reshape(len(states), -1, model.config.decoder.hidden_size)


def run_objective_chunked(
    model: nn.Module, batch: Mapping[str, torch.Tensor], chunk: int, *, judge: bool = True
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run a model on the batch of one objective without ever holding all its logits.

    Args:
        model (`nn.Module`): The model, possibly wrapped for several processes.
        batch (`Mapping`): As for [`run_objective`].
        chunk (`int`): Tokens whose logits exist at once.
        judge (`bool`): Whether to count right tokens.

    Returns:
        The sum of the token losses (a scalar with gradient), the number of right tokens and the number of targets.
    """
    own = model.module if hasattr(model, "module") else model
    inputs = model_inputs(own, batch)
    targets = targets_of(batch)
    if "columns" in batch:
        targets = targets[:, batch["columns"]]
        inputs["logits_to_keep"] = batch["columns"]
    with without_head(own) as head:
        states = model(**inputs, **({} if "labels" in batch else {"use_cache": False})).logits
    loss_sum, correct = chunked_cross_entropy(head, states, targets, chunk, judge=judge)
    return loss_sum, correct, (targets != IGNORED).sum()


class MemoryTrainer(Trainer):
    """`Trainer` over batches of `{objective: inputs}`.

    Args:
        model (`PreTrainedModel`): A memory autoencoder, a causal LM or a memory encoder-decoder.
        args (`TrainingArguments`): From [`training_arguments`].
        objectives (`dict[str, float]`): Objective -> weight.
        training (`TrainingRecipe`): Optimizer, learning rates and their multipliers, bf16.
        train_dataset (`TokenRows`, `DocumentRows` or `StreamedRows`): Rows in training order.
        eval_dataset (`TokenRows`, *optional*): Validation rows, any number of them: each counts once.
        data_collator (`Callable`): Turns rows into `{objective: inputs}` plus `"rows"`, their numbers.
        label (`str`): What progress lines are headed by.

    After SIGTERM `train` saves a checkpoint at the end of the step and returns with `stopped` set. A checkpoint that
    cannot be written, for lack of space say, is reported, and training goes on; the last good one is kept.

    Raises:
        NonFiniteLossError: From `train`, naming step, objective and rows; checkpoints that exist are kept, and no
            checkpoint with a non-finite weight is written.
    """

    optimizer: torch.optim.Optimizer | None
    data_collator: Any

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        *,
        objectives: dict[str, float],
        training: TrainingRecipe,
        train_dataset: TokenRows | DocumentRows | StreamedRows,
        eval_dataset: TokenRows | None = None,
        data_collator: Any,
        label: str = "",
    ) -> None:
        if eval_dataset is not None:
            eval_dataset = eval_dataset.padded_to(args.per_device_eval_batch_size * args.world_size)
        super().__init__(
            model, args, train_dataset=train_dataset, eval_dataset=eval_dataset, data_collator=data_collator
        )
        self.objectives = objectives
        self.training = training
        self._check_sharding(data_collator.spec.layout)
        self._check_loss_chunk(data_collator)
        if training.gradient_checkpointing:
            checkpoint_activations(self.model)
        if training.compile:
            compile_blocks(self.model)
        # `compute_loss` divides by the targets of the whole accumulated batch itself.
        self.loss_is_scaled_for_ga = True
        self.model_accepts_loss_kwargs = True
        self.stopped = False
        self._signal = StopSignal()
        self._sums: dict[str, torch.Tensor] = {}
        self._tokens_since = (0, time.perf_counter())
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.add_callback(StageProgress(label))
        self.add_callback(StopWhenAsked(self))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as `Trainer.train` does; SIGTERM ends it after the step, with a checkpoint."""
        with StopSignal() as self._signal:
            return super().train(*args, **kwargs)

    @property
    def _sharded(self) -> bool:
        """Whether no process holds all parameters."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def _check_loss_chunk(self, collator: Any) -> None:
        """Refuse a head that does not give its logits token by token."""
        if self.training.loss_chunk is not None:
            batches = collator([self.train_dataset[0]])
            for name in self.objectives:
                batch = {key: tensor.to(self.args.device) for key, tensor in batches[name].items()}
                check_head(self.model, model_inputs(self.model, batch))

    def _check_sharding(self, layout: str) -> None:
        """Refuse what sharded parameters cannot do.

        Raises:
            ValueError: If windows share a memory prefix whose cache is all that leads back to it (the layers gather
                their parameters for the backward pass when a gradient reaches their *output*), or Muon would be given
                flattened pieces of matrices.
        """
        training = self.training
        if self.is_deepspeed_enabled and training.optimizer == "muon":
            raise ValueError("DeepSpeed flattens matrices and Muon needs them whole; set training.optimizer: adamw")
        if not self._sharded:
            return
        for what, part, is_set in (
            ("training.loss_chunk", "the whole output head", training.loss_chunk is not None),
            ("training.watch_steps", "whole parameters", training.watch_steps is not None),
            ("distillation's teacher", "a whole decoder", "distillation" in self.objectives),
        ):
            if is_set:
                raise ValueError(f"{what} needs {part}; leave it out with FSDP or DeepSpeed")
        has_windows = getattr(self.model.config, "window_length", None) is not None
        if has_windows and layout == "self" and not training.gradient_checkpointing:
            raise ValueError(
                "with sharded parameters (FSDP, DeepSpeed) windows cannot share the cache of their memories; set "
                "training.gradient_checkpointing: true, or data.layout: slots"
            )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Build the recipe's optimizer over the trainable parameters."""
        if self.optimizer is None:
            training = self.training
            self.optimizer = build_optimizer(
                self.model if model is None else model,
                optimizer=training.optimizer,
                learning_rate=training.learning_rate,
                muon_learning_rate=training.muon_learning_rate,
                weight_decay=training.weight_decay,
                betas=(training.adam_beta1, training.adam_beta2),
                lr_multipliers=training.lr_multipliers,
            )
        return self.optimizer

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> AbstractContextManager:
        """Autocast to bf16 here: accelerate's own way would copy the logits of every step to float32."""
        return torch.autocast(
            self.args.device.type, dtype=torch.bfloat16, enabled=self.training.bf16, cache_enabled=bool(cache_enabled)
        )

    def floating_point_ops(self, inputs: Any) -> int:
        """Return 0: a nested batch has no single input to estimate from; tokens are counted instead."""
        return 0

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
        """Collect the micro-batches of one step and count each objective's targets over the global batch."""
        batches = list(islice(epoch_iterator, num_batches))
        sums = [sum((targets_of(batch[name]) != IGNORED).sum() for batch in batches) for name in self.objectives]
        # The wish to stop travels with the counts: all processes leave after the same step.
        counts = torch.stack([*sums, torch.tensor(int(self._signal.asked))]).to(device)
        if self.args.world_size > 1:
            counts = self.accelerator.reduce(counts, reduction="sum")
            self.stopped = bool(counts[-1])
        return batches, dict(zip(self.objectives, counts[:-1], strict=True))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> torch.Tensor:
        """Return the weighted sum of the objectives' losses, each over its global number of targets."""
        next_step = self.state.global_step + 1
        measured = next_step % self.args.logging_steps == 0 or next_step == 1
        loss_sums = {}
        for name in self.objectives:
            loss_sums[name] = self._measure(name, model, inputs[name], judge=measured)
        total = combine_losses(loss_sums, num_items_in_batch, self.objectives)
        self._check_finite(total, inputs["rows"])
        tokens, since = self._tokens_since
        packed = inputs["rows"].numel() * self.train_dataset.row_length
        self._tokens_since = tokens + int(inputs.get("num_tokens", packed)), since
        if isinstance(model, DistributedDataParallel):
            # Every parameter takes part, or a process would wait for it; sharded models count for themselves.
            total = total + sum(p.sum() for p in self.model.parameters() if p.requires_grad) * 0.0
        return total * self.args.world_size  # gradients are averaged over processes

    @torch.no_grad()
    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[None, None, None]:
        """Add one evaluation batch to the sums; `log` turns them into metrics."""
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            for name in self.objectives:
                self._measure(f"eval_{name}", model, inputs[name], judge=True)
        return None, None, None

    def _measure(self, key: str, model: nn.Module, batch: dict[str, torch.Tensor], *, judge: bool) -> torch.Tensor:
        """Return an objective's sum of token losses; add it, its targets, right tokens and tokens judged to the sums.

        Accuracy is judged on logged steps only: the argmax over a vocabulary costs a CPU several per cent of a step.
        """
        chunk = self.training.loss_chunk
        if chunk is None:
            settings = self.training
            teaching = Teaching(
                settings.distillation_temperature, settings.distillation_depths, settings.distillation_states_weight
            )
            loss_sum, logits, targets = run_objective(model, batch, teaching=teaching)
            present = targets != IGNORED
            count = present.sum()
            correct = ((logits.detach().argmax(-1) == targets) & present).sum() if judge else torch.zeros_like(count)
        else:
            loss_sum, correct, count = run_objective_chunked(model, batch, chunk, judge=judge)
        judged = count if judge else torch.zeros_like(count)
        sums = torch.stack([loss_sum.detach().double(), count.double(), correct.double(), judged.double()])
        self._sums[key] = self._sums[key] + sums if key in self._sums else sums
        return loss_sum

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add each objective's loss and token accuracy from sums over all steps since the last log."""
        prefix = "eval_" if any(key.startswith("eval_") for key in logs) else ""
        for name in self.objectives:
            sums = self._sums.pop(prefix + name, None)
            if sums is None:
                continue
            if self.args.world_size > 1:
                sums = self.accelerator.reduce(sums, reduction="sum")
            loss_sum, count, correct, judged = sums.tolist()
            if not count:  # no row had a target
                continue
            logs[f"{prefix}{name}_loss"] = loss_sum / count
            if judged:
                logs[f"{prefix}{name}_token_accuracy"] = correct / judged
        if prefix and all(f"eval_{name}_loss" in logs for name in self.objectives):
            logs["eval_loss"] = sum(weight * logs[f"eval_{name}_loss"] for name, weight in self.objectives.items())
        super().log(logs if prefix else {**logs, **self._training_figures()}, start_time)

    def _training_figures(self) -> dict[str, float]:
        """Return what a log of training steps tells beside losses: the projector's norm, speed and memory."""
        figures: dict[str, float] = {}
        projector = None if self._sharded else getattr(self.model, "projector", None)
        weights = [] if projector is None else [p.detach().float().norm() for p in projector.parameters()]
        if weights:  # its norm is free; a run that lets it grow without end shows here
            figures["projector_norm"] = torch.stack(weights).norm().item()
        tokens, since = self._tokens_since
        if tokens:
            now = time.perf_counter()
            figures["text_tokens_per_second"] = round(tokens * self.args.world_size / (now - since), 1)
            figures["peak_memory_bytes"] = peak_memory_bytes()["process"]
            self._tokens_since = 0, now
        return figures

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """Return validation batches as `Trainer` does, made by the collator's `for_evaluation()` if it has one."""
        of_training = self.data_collator
        self.data_collator = getattr(of_training, "for_evaluation", lambda: of_training)()
        try:
            return super().get_eval_dataloader(*args, **kwargs)
        finally:
            self.data_collator = of_training

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate as `Trainer.evaluate` does; its time is not counted in the tokens per second of training."""
        started = time.perf_counter()
        metrics = super().evaluate(*args, **kwargs)
        tokens, since = self._tokens_since
        self._tokens_since = tokens, since + time.perf_counter() - started
        return metrics

    def _check_finite(self, loss: torch.Tensor, rows: torch.Tensor) -> None:
        """Stop all processes when one of them has a loss that is no finite number."""
        bad = (~torch.isfinite(loss.detach())).float()
        if self.args.world_size > 1:
            bad = self.accelerator.reduce(bad, reduction="sum")
        if bad:
            named = ", ".join(str(row) for row in rows.tolist())
            raise NonFiniteLossError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1} (batch of rows {named}). The last "
                "checkpoint is kept: lower the learning rate or lengthen the warm-up and start again; if it fails at "
                "the same rows, look at their text"
            )

    def _get_output_dir(self, trial: Any) -> str:
        """Return where a checkpoint is written before it is put in its place."""
        return str(Path(super()._get_output_dir(trial)) / PART)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint beside its place and rename it; the last good one stays until the new one is whole."""
        for name, parameter in self.model.named_parameters():
            if not torch.isfinite(parameter).all():
                raise NonFiniteLossError(
                    f"{name} is not finite after step {self.state.global_step}; no checkpoint was written and the "
                    "earlier one is kept. Lower the learning rate or lengthen the warm-up"
                )
        part = Path(self._get_output_dir(trial))
        if self.args.should_save:
            shutil.rmtree(part, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        name = f"checkpoint-{self.state.global_step}"
        fault = self._attempt(lambda: super(MemoryTrainer, self)._save_checkpoint(model, trial))
        if fault is None:
            fault = self._attempt(lambda: self._commit(part / name, part.parent / name))
        if fault is not None and self.args.should_save:
            shutil.rmtree(part, ignore_errors=True)
            kept = last_complete_checkpoint(part.parent)
            remedy = f"{kept.name} is kept" if kept is not None else "there is no earlier one"
            tqdm.write(
                f"warning: {name} could not be written ({fault}); {remedy}. Training goes on: free space on the disk",
                file=sys.stderr,
            )

    def _attempt(self, write: Callable[[], None]) -> str | None:
        """Write something on all processes; return what went wrong on any of them, on all of them."""
        fault = None
        try:
            write()
        except NonFiniteLossError:
            raise
        except WRITE_ERRORS as error:
            fault = str(error).splitlines()[0] if str(error) else type(error).__name__
        if self.args.world_size > 1:
            failed = torch.tensor(float(fault is not None), device=self.args.device)
            if self.accelerator.reduce(failed, reduction="sum"):
                fault = fault or "another process failed"
        return fault

    def _commit(self, part: Path, final: Path) -> None:
        if self.args.should_save:
            commit(part, final, self.state.global_step)
            rotate(final.parent, self.args.save_total_limit or 1)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Save the model, its frozen weights as a link to those that were written with the first checkpoint."""
        own = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        whole = self._sharded or not isinstance(own, PreTrainedModel)
        if output_dir is None or whole or not frozen_names(own):
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            save_split(own, Path(output_dir), Path(self.args.output_dir))


class StopWhenAsked(TrainerCallback):
    """Ends training after the step in which SIGTERM arrived, with a checkpoint and without another evaluation."""

    def __init__(self, trainer: MemoryTrainer) -> None:
        self.trainer = trainer

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ask the Trainer to save and to stop; processes agree on the step beforehand."""
        trainer = self.trainer
        if args.world_size == 1:
            trainer.stopped = trainer._signal.asked
        if trainer.stopped:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False


class StageProgress(TrainerCallback):
    """A progress bar on a terminal, and one readable line at each log everywhere."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.bar: tqdm | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar."""
        if state.is_world_process_zero and sys.stderr.isatty():
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self.label, leave=False)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Advance the bar."""
        if self.bar is not None:
            self.bar.update(1)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Print the losses and accuracies of one log."""
        line = progress_line(self.label, state.global_step, state.max_steps, logs or {})
        if state.is_world_process_zero and line:
            tqdm.write(line)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Let a model compute its activations again in the backward pass; the method's name changed within the library."""
    new = getattr(model, "activation_checkpointing_enable", None)
    (model.gradient_checkpointing_enable if new is None else new)({"use_reentrant": False})


def compile_blocks(model: nn.Module, **options: Any) -> None:
    """Let `torch.compile` compile the repeated layers of a model, in place: no name of a module or weight changes.

    Layers of one kind share what is compiled, unless they read a cache. What stands between them runs as it is.

    Args:
        model (`nn.Module`): The model.
        options: Passed to `torch.compile`.
    """
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            for block in module:
                block.compile(**options)


def progress_line(label: str, step: int, max_steps: int, logs: Mapping[str, float]) -> str:
    """Write one log as one line; empty if it holds neither an objective's loss nor a look at the memories.

    >>> progress_line("decoder", 50, 200, {"loss": 3.2, "causal_loss": 3.2, "causal_token_accuracy": 0.301})
    'decoder 50/200 | causal 3.200 30.1%'
    >>> progress_line("decoder", 50, 200, {"eval_causal_loss": 3.1, "eval_causal_token_accuracy": 0.3})
    'decoder 50/200 validation | causal 3.100 30.0%'
    >>> progress_line("copy", 5, 9, {"copy_loss": 1.0, "text_tokens_per_second": 4321.0, "peak_memory_bytes": 2**30})
    'copy 5/9 | copy 1.000 | 4,321 tokens/s, 1.0 GiB'
    >>> looked = {"memory_norm_to_tokens": 1.1, "memory_effective_rank": 9.53, "memory_attention_share": 0.2}
    >>> progress_line("copy", 5, 9, looked)
    "copy 5/9 memories | 1.10 of a token's length, effective rank 9.5, 20.0% of the attention"
    """
    if "memory_effective_rank" in logs:
        norm, rank = logs["memory_norm_to_tokens"], logs["memory_effective_rank"]
        return (
            f"{label} {step}/{max_steps} memories | {norm:.2f} of a token's length, effective rank {rank:.1f}, "
            f"{logs['memory_attention_share']:.1%} of the attention"
        )
    prefix = "eval_" if any(key.startswith("eval_") for key in logs) else ""
    parts = []
    for key, value in logs.items():
        if key.startswith(prefix) and key.endswith("_loss") and key not in ("eval_loss", "train_loss"):
            name = key[len(prefix) : -len("_loss")]
            accuracy = logs.get(f"{prefix}{name}_token_accuracy")
            parts.append(f"{name} {value:.3f}" + ("" if accuracy is None else f" {accuracy:.1%}"))
    if not parts:
        return ""
    if "text_tokens_per_second" in logs:
        memory = logs.get("peak_memory_bytes", 0) / 2**30
        parts.append(f"{logs['text_tokens_per_second']:,.0f} tokens/s, {memory:.1f} GiB")
    return " | ".join([f"{label} {step}/{max_steps}" + (" validation" if prefix else ""), *parts])


def training_arguments(
    training: TrainingRecipe,
    output_dir: Path,
    *,
    seed: int,
    use_cpu: bool = False,
    report_to: list[str] | None = None,
) -> TrainingArguments:
    """Translate a stage's settings into `TrainingArguments`."""
    schedule_kwargs: dict[str, Any] = {}
    if training.schedule == "warmup_stable_decay":
        schedule_kwargs = {"num_decay_steps": round(training.decay * training.max_steps), "decay_type": "linear"}
    arguments = TrainingArguments(
        output_dir=str(output_dir),
        max_steps=training.max_steps,
        per_device_train_batch_size=training.batch_size,
        per_device_eval_batch_size=training.batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        learning_rate=training.learning_rate,
        max_grad_norm=training.max_grad_norm,
        lr_scheduler_type=SCHEDULES[training.schedule],
        lr_scheduler_kwargs=schedule_kwargs,
        warmup_steps=round(training.warmup * training.max_steps),
        logging_steps=training.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if training.eval_steps else "no",
        eval_steps=training.eval_steps,
        save_strategy="steps" if training.save_steps else "no",
        save_steps=training.save_steps or training.max_steps,
        save_total_limit=training.save_total_limit,
        train_sampling_strategy="sequential",  # `TokenRows` is in training order already
        remove_unused_columns=False,
        dataloader_num_workers=training.num_workers,
        dataloader_pin_memory=not use_cpu and torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
        disable_tqdm=True,
        report_to=report_to or "none",
        use_cpu=use_cpu,
        seed=seed,
        data_seed=seed,
    )
    # One process uses one GPU; for several, `accelerate launch`. DataParallel would cut a nested batch by its first
    # dimension, chunks and windows alike.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments
