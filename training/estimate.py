"""What a recipe will need, computed from its configuration before anything is downloaded: memory and time, estimated.

```bash
python -m training.estimate llama_3_2_1b
python -m training.estimate smollm2_135m_minilm stages.memory.training.batch_size=64 --rate 5.0e13
```

Models are built on the meta device, where parameters have shapes and no values. What is counted, of each stage:

- weights in float32, their copies in bfloat16 under autocast, gradients and the optimizer's moments of what trains;
- activations that wait for the backward pass, 34 bytes a token, layer and unit of width without recomputation
  (Korthikanti et al. 2022, arXiv 2205.05198, section 4.1, attention that keeps no scores), 2 with
  `gradient_checkpointing` and one layer whole; logits with their softmax and gradient, 10 bytes each;
- operations: 2 for each weight of a layer or head and token forward, as many again for each layer that gradients pass,
  and as many again for each weight that trains.

None of this was measured. Fragmentation, kernels and attention itself come on top.
"""

import argparse
import copy
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForTextEncoding, PreTrainedModel

from modeling_memory.memory_parts import load_encoder

from .command_line import Parser, positive_number, run_command
from .data.objectives import SpecialTokens
from .places import program
from .recipes.recipe import Recipe, StageRecipe, load_recipe
from .train.build import build_stage_model, child_config

RATE = 1.0e14
FLOAT, HALF = 4, 2
LAYER_BYTES = 34
LOGIT_BYTES = 10


@dataclass(frozen=True)
class Estimate:
    """What a stage is estimated to need.

    Attributes:
        stage (`str`): Its name.
        parameters (`int`): All parameters.
        trainable (`int`): Those that train.
        state_bytes (`int`): Weights, copies, gradients and moments.
        activation_bytes (`int`): What waits for the backward pass, and logits.
        operations (`float`): Of one optimizer step.
        steps (`int`): Optimizer steps.
    """

    stage: str
    parameters: int
    trainable: int
    state_bytes: int
    activation_bytes: int
    operations: float
    steps: int

    def line(self, rate: float = RATE) -> str:
        """Write it as one line, at so many operations a second.

        >>> Estimate("memory", 2_000_000, 1_000, 2**30, 2**29, 5.0e13, 1000).line(1.0e14)
        'memory: 1.5 GiB, 0.50 s a step, 0.1 h, at 1.0e+14 operations a second'
        """
        total = (self.state_bytes + self.activation_bytes) / 2**30
        seconds = self.operations / rate
        hours = seconds * self.steps / 3600
        return (
            f"{self.stage}: {total:.1f} GiB, {seconds:.2f} s a step, {hours:.1f} h, at {rate:.1e} operations a second"
        )


def build_on_meta(recipe: Recipe) -> dict[str, PreTrainedModel]:
    """Build the model of every stage on the meta device, pretrained ones from what the recipe says of them.

    Args:
        recipe (`Recipe`): Its pretrained models have a `config` with `model_type` and sizes.

    Raises:
        ValueError: If a pretrained model has no architecture, or parts do not fit.
    """
    vocab_size = recipe.tokenizer.vocab_size
    decoders = [stage.from_.get(key) for stage in recipe.stages for key in ("decoder", "model")]
    for name in filter(None, decoders):
        if name in recipe.pretrained:
            vocab_size = recipe.pretrained[name].config.get("vocab_size", vocab_size)
    own = recipe.tokenizer.path is None  # a tokenizer made elsewhere has no markers
    special = SpecialTokens(pad=0, bos=1, eos=2, memory=vocab_size, copy=3 if own else None, blank=4 if own else None)
    models: dict[str, Any] = {}

    def load(name: str) -> Any:
        if name in recipe.pretrained:
            return pretrained_on_meta(recipe, name)
        return copy.deepcopy(models[name])  # the next stage freezes and thaws its own

    with torch.device("meta"):
        for stage in recipe.stages:
            models[stage.name] = build_stage_model(stage, special_tokens=special, vocab_size=vocab_size, load=load)
    return models


def pretrained_on_meta(recipe: Recipe, name: str) -> Any:
    """Build a pretrained model from the architecture in a recipe, with random weights, or none on the meta device."""
    described = recipe.pretrained[name].config
    if "model_type" not in described:
        raise ValueError(
            f"pretrained.{name}.config has no model_type; describe the architecture, as its config.json does, to "
            "estimate what it needs"
        )
    config = child_config(described, {}, f"pretrained.{name}.config")
    # One that is both is given whole: its body is taken where the parts are joined.
    parts = {part for stage in recipe.stages for part, source in stage.from_.items() if source == name}
    if parts != {"encoder"}:
        return AutoModelForCausalLM.from_config(config)
    is_t5 = type(config) in AutoModelForTextEncoding._model_mapping
    body = (AutoModelForTextEncoding if is_t5 else AutoModel).from_config(config)
    return load_encoder(body)


def estimate_recipe(recipe: Recipe) -> list[Estimate]:
    """Estimate every stage of a recipe, for one process."""
    models = build_on_meta(recipe)
    return [estimate_stage(stage, models[stage.name]) for stage in recipe.stages]


def estimate_stage(stage: StageRecipe, model: PreTrainedModel) -> Estimate:
    """Estimate one stage.

    Args:
        stage (`StageRecipe`): Its lengths and batch.
        model (`PreTrainedModel`): Its model, on any device.
    """
    training, rows = stage.training, stage.data
    parameters = sum(parameter.numel() for parameter in model.parameters())
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    moments = 2 if training.optimizer == "adamw" else 1.5  # Muon keeps one for matrices; tables have two
    state = parameters * (FLOAT + HALF * training.bf16) + trainable * FLOAT * (1 + moments)
    tokens = training.batch_size * rows.row_length
    read = tokens * (len(stage.objectives) or 1)
    activations = operations = 0.0
    encoder: Any = getattr(model, "encoder", None)
    for part in (model,) if encoder is None else (encoder, model.decoder):
        # A frozen encoder keeps nothing for a backward pass, and none of its operations if it reads once.
        live = part is not encoder or any(parameter.requires_grad for parameter in part.parameters())
        weights, moved = _used_weights(part), _used_weights(part, trained=True)
        if part is not encoder or not rows.encode_once:
            operations += 2.0 * read * (weights * (1 + live) + moved)
        if live:
            activations += _activation_bytes(part, tokens, training.bf16, training.gradient_checkpointing)
    vocabulary = getattr(model.config, "vocab_size", None) or 0
    at_once = tokens if training.loss_chunk is None else min(tokens, training.loss_chunk)
    activations += LOGIT_BYTES * at_once * vocabulary
    steps_of = training.gradient_accumulation_steps
    return Estimate(
        stage.name, parameters, trainable, int(state), int(activations), operations * steps_of, training.max_steps
    )


def _used_weights(part: nn.Module, *, trained: bool = False) -> int:
    """Count the weights that every token meets: matrices but token tables; a head that is a table counts."""
    tables = {id(module.weight) for module in part.modules() if isinstance(module, nn.Embedding)}
    get_head = getattr(part, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    heads = set() if head is None else {id(head.weight)}
    return sum(
        parameter.numel()
        for parameter in part.parameters()
        if (id(parameter) not in tables or id(parameter) in heads) and (parameter.requires_grad or not trained)
    )


def _activation_bytes(part: PreTrainedModel, tokens: int, bf16: bool, checkpointing: bool) -> float:
    """Bytes that wait for the backward pass of a stack of layers; twice as many in float32."""
    config = part.config
    layers, width = getattr(config, "num_hidden_layers", 1), config.hidden_size
    size = 1 if bf16 else 2
    whole = LAYER_BYTES * size * tokens * width
    return HALF * size * tokens * width * layers + whole if checkpointing else whole * layers


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = Parser(
        prog=program("estimate"),
        description="Estimate memory and time of a recipe from its configuration; nothing is downloaded or measured.",
    )
    parser.add_argument("recipe", help="YAML file, or the name of one in configuration/recipes")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for python -m training.run")
    parser.add_argument(
        "--rate",
        type=positive_number,
        default=RATE,
        metavar="N",
        help=f"operations a second that are reached ({RATE:.1e})",
    )
    return parser


def run(options: argparse.Namespace, command: str) -> None:
    """Print the estimate of every stage."""
    estimates = estimate_recipe(load_recipe(options.recipe, options.overrides))
    print("estimated from the configuration, for one process; not measured")
    for found in estimates:
        print(f"  {found.line(options.rate)}; {found.trainable:,} of {found.parameters:,} parameters train")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return run_command(build_parser(), run, arguments)


if __name__ == "__main__":
    sys.exit(main())
