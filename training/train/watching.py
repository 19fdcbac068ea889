"""Looking at memories while a model trains: how large, how different, how much read.

- `memory_norm`: mean length of the memories as the decoder gets them, and `memory_norm_to_tokens`, the same as a
  multiple of the mean length of its token embeddings: far from 1 the decoder reads them badly.
- `memory_effective_rank`: the number of directions in which memories differ, exp of the entropy of their singular
  values after the mean memory is taken away (Roy and Vetterli 2007, *The effective rank*, equation 2); 0 if all are
  equal. At most the number of memories less 1, and the decoder's width.
- `memory_attention_share`: how much of the attention of a text's tokens goes to the memories before it, the mean over
  tokens, heads and layers, and `memory_attention_share_<layer>` of each. `memory_column_share` is what equal attention
  to all visible columns would give.
"""

from typing import Any

import torch
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments


def effective_rank(vectors: torch.Tensor) -> float:
    """Return exp of the entropy of the singular values of `(N, D)` vectors less their mean; 0 if all are equal.

    >>> vectors = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    >>> round(effective_rank(vectors), 4), round(effective_rank(vectors[:2]), 4)
    (2.0, 1.0)
    """
    values = torch.linalg.svdvals((vectors - vectors.mean(0)).double().cpu())
    if values[0] <= 1e-6 * vectors.norm(dim=-1).max().item():
        return 0.0
    shares = values / values.sum()
    return torch.special.entr(shares).sum().exp().item()


@torch.no_grad()
def memory_statistics(model: Any, tokens: torch.Tensor) -> dict[str, float]:
    """Look at the memories of texts and at how the last window of each reads them.

    Args:
        model ([`MemoryEncoderDecoderForCausalLM`]): The model; left as it was. Attentions are computed by the
            library's `eager` implementation, in float32 without autocast.
        tokens (`torch.LongTensor` of shape `(B, n)`): Texts without padding, two windows or more. What fills no
            window is left out at their end; all windows but the last become memories.

    Returns:
        `dict[str, float]`: The quantities above.

    Raises:
        ValueError: If texts have less than two windows.
    """
    config = model.config
    num_windows = tokens.shape[1] // config.window_length
    if num_windows < 2:
        raise ValueError(
            f"texts have {tokens.shape[1]} tokens, but two windows of {config.window_length} are needed: one that "
            "becomes memories and one that reads them. Give longer texts."
        )
    border = (num_windows - 1) * config.window_length
    context = tokens[:, :border].reshape(len(tokens), -1, config.chunk_length)
    text = tokens[:, border : border + config.window_length]
    training, attention = model.training, model.decoder.config._attn_implementation
    with torch.autocast(tokens.device.type, enabled=False), torch.compiler.set_stance("force_eager"):
        try:
            model.eval()
            model.decoder.set_attn_implementation("eager")
            memories, mask = model.encode_memories(context)  # (B, M, D), (B, M)
            embeds = model.get_input_embeddings()(text)  # (B, W, D)
            outputs = model(
                inputs_embeds=embeds, memory_embeds=memories, memory_mask=mask, use_cache=False, output_attentions=True
            )
        finally:
            model.decoder.set_attn_implementation(attention)
            model.train(training)
    present = memories[mask.bool()].float()
    norm = present.norm(dim=-1).mean().item()
    attentions = outputs.attentions
    columns = attentions[0].shape[-1] - text.shape[1]  # before the text: memories, and where positions are fixed gaps
    shares = [layer[:, :, -text.shape[1] :, :columns].float().sum(-1).mean().item() for layer in attentions]
    seen = torch.arange(1, text.shape[1] + 1) + memories.shape[1]
    return {
        "memory_norm": norm,
        "memory_norm_to_tokens": norm / embeds.float().norm(dim=-1).mean().item(),
        "memory_effective_rank": effective_rank(present),
        "memory_attention_share": sum(shares) / len(shares),
        "memory_column_share": (memories.shape[1] / seen).mean().item(),
        **{f"memory_attention_share_{i}": share for i, share in enumerate(shares)},
    }


class WatchMemories(TrainerCallback):
    """Puts [`memory_statistics`] of some texts into the Trainer's log every so many steps.

    Args:
        trainer (`Trainer`): The trainer whose log it is. All its processes look at the same texts.
        tokens (`torch.LongTensor` of shape `(B, n)`): The texts.
        steps (`int`): Steps between two looks.
    """

    def __init__(self, trainer: Any, tokens: torch.Tensor, steps: int) -> None:
        self.trainer = trainer
        self.tokens = tokens
        self.steps = steps

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look, and log what was seen."""
        if state.global_step % self.steps == 0:
            model: PreTrainedModel = self.trainer.accelerator.unwrap_model(self.trainer.model)
            # The library's own: losses that are summed up for the trainer's next log stay for that one.
            Trainer.log(self.trainer, memory_statistics(model, self.tokens.to(args.device)))


__all__ = ["WatchMemories", "effective_rank", "memory_statistics"]
