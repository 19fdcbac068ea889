"""Generation with memories: context read once, full windows folded while the text grows."""

from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.generation import GenerationConfig, GenerationMixin
from transformers.generation.logits_process import LogitsProcessorList

from .memory_cache import MemoryCache
from .memory_merging import merge_plan
from .memory_text import check_has_owner


class MemoryGenerationMixin(GenerationMixin):
    """What [`MemoryEncoderDecoderForCausalLM`] adds to the library's `generate`."""

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args: Any,
        context_input_ids: torch.LongTensor | None = None,
        context_attention_mask: torch.LongTensor | None = None,
        context_num_memories: torch.LongTensor | None = None,
        rolling_memory: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate as the library does, from plain text of any length or from a prompt with memories in its slots.

        Args:
            inputs (`torch.LongTensor` of shape `(B, T)`, *optional*): Prompt, also as `input_ids`; padded on the left.
            generation_config (`GenerationConfig`, *optional*): As in the library.
            args: As in the library.
            context_input_ids (`torch.LongTensor` of shape `(B, C, L)`, *optional*): Chunks of a context; encoded once.
            context_attention_mask (`torch.LongTensor` of shape `(B, C, L)`, *optional*): 1 for tokens, 0 for padding.
            context_num_memories (`torch.LongTensor` of shape `(B, C)`, *optional*): Memories of each chunk.
            rolling_memory (`bool`, *optional*): Whether a window that fills up while writing folds into memories; if
                not, it grows on. Default: `config.self_memory` for plain text, no behind memories, where True folds
                what follows the last slot.
            kwargs: As in the library; `memory_embeds` and `memory_mask` are ready memories for the prompt's slots.

        Returns:
            What the library returns: prompt and new tokens, or a generation output.

        Raises:
            ValueError: If an option cannot be right with memories, or a prompt is padded on the right.
        """
        check_has_owner("context_attention_mask", context_attention_mask, "context_input_ids", context_input_ids)
        check_has_owner("memory_mask", kwargs.get("memory_mask"), "memory_embeds", kwargs.get("memory_embeds"))
        if context_input_ids is not None:
            kwargs["memory_embeds"], kwargs["memory_mask"] = self._context_memories(
                context_input_ids, context_attention_mask, kwargs.get("memory_embeds"), context_num_memories
            )
        has_memories = kwargs.get("memory_embeds") is not None
        has_ids = kwargs.get("inputs_embeds") is None
        if rolling_memory and not (self.config.self_memory and has_ids):
            reason = "embeddings were given" if self.config.self_memory else "`config.self_memory` is False"
            raise ValueError(
                f"`rolling_memory=True` folds text of the encoder's own tokenizer, but {reason}. Leave it out."
            )
        plain = has_ids and not has_memories
        rolling = self.config.self_memory and plain if rolling_memory is None else rolling_memory
        self._check_generation_options(generation_config, kwargs, rolling)
        if plain and rolling_memory is False and self.config.self_memory:
            self._check_cached(generation_config, kwargs)
        if has_memories and kwargs.get("memory_mask") is None:
            kwargs["memory_mask"] = torch.ones_like(kwargs["memory_embeds"][..., 0], dtype=torch.long)
        input_ids = inputs if inputs is not None else kwargs.get("input_ids")
        if input_ids is not None:
            self._check_padding_side(input_ids, kwargs.get("attention_mask"))
            if has_memories and len(kwargs["memory_embeds"]) == 1:
                kwargs["memory_embeds"] = kwargs["memory_embeds"].expand(len(input_ids), -1, -1)
                kwargs["memory_mask"] = kwargs["memory_mask"].expand(len(input_ids), -1)
        return super().generate(inputs, generation_config, *args, rolling_memory=rolling, **kwargs)

    def _check_generation_options(
        self, generation_config: GenerationConfig | None, kwargs: dict[str, Any], rolling: bool
    ) -> None:
        def option(name: str) -> Any:
            given = kwargs.get(name)
            return getattr(generation_config or self.generation_config, name, None) if given is None else given

        assistant = "assistant_model" if kwargs.get("assistant_model") is not None else "assistant_early_exit"
        if kwargs.get("assistant_model") is not None or option("assistant_early_exit") is not None:
            raise ValueError(
                f"`{assistant}` was given, but an assistant does not see the memories and its rejected tokens cannot "
                "be taken out of them. Generate without it."
            )
        if option("prefill_chunk_size") is not None:
            raise ValueError(
                f"`prefill_chunk_size` is {option('prefill_chunk_size')}, but a prompt cut at arbitrary columns loses "
                "its slots and windows. Leave it out: the windows are short already."
            )
        if not (rolling or self.config.window_positions):
            return
        if option("prompt_lookup_num_tokens") is not None:
            raise ValueError(
                f"`prompt_lookup_num_tokens` is {option('prompt_lookup_num_tokens')}, but rejected tokens cannot be "
                "taken out of a memory. Leave it out, or pass `rolling_memory=False` with a prompt of one window."
            )
        if option("cache_implementation") not in (None, "dynamic"):
            raise ValueError(
                f"`cache_implementation` is {option('cache_implementation')!r}, but a text that folds into memories "
                "needs its own cache. Leave it out, or pass `rolling_memory=False` with a prompt of one window."
            )

    def _check_cached(self, generation_config: GenerationConfig | None, kwargs: dict[str, Any]) -> None:
        use_cache = kwargs.get("use_cache")
        if use_cache is None:
            use_cache = getattr(generation_config or self.generation_config, "use_cache", None)
        if use_cache is False:
            raise ValueError(
                "`rolling_memory` is False and so is `use_cache`, but with no cache every step reads all text and "
                "folds its full windows. Leave one of them out."
            )

    def _check_padding_side(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
        if input_ids.dim() != 2 or 0 in input_ids.shape:
            raise ValueError(
                f"The prompt has shape {tuple(input_ids.shape)}; expected (batch, tokens), none of them 0. Give at "
                "least one token."
            )
        if attention_mask is None:
            pad, eos = self.config.pad_token_id, self.config.eos_token_id
            if pad is None or pad in (eos if isinstance(eos, list) else [eos]):
                return
            padded = input_ids[:, -1] == pad
        else:
            padded = attention_mask[:, -1] == 0
        if padded.any():
            raise ValueError(
                f"Row {int(padded.nonzero()[0])} of the prompt ends in padding, and the next token would be drawn "
                "from it. Pad on the left: `tokenizer.padding_side = 'left'`."
            )

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        memory_embeds: torch.Tensor | None = None,
        memory_mask: torch.Tensor | None = None,
        rolling_memory: bool | None = None,
        is_first_iteration: bool = False,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Lay out one step: memories enter with the prompt, later steps find them in the cache."""
        model_inputs = GenerationMixin.prepare_inputs_for_generation(
            self,
            input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            use_cache=use_cache,
            **kwargs,
        )
        if memory_embeds is not None and (is_first_iteration or not use_cache):
            model_inputs.update(memory_embeds=memory_embeds, memory_mask=memory_mask, rolling_memory=rolling_memory)
        mask = model_inputs.get("attention_mask")
        if mask is None or mask.dim() == 2:  # the model derives positions itself: they depend on memories
            model_inputs.pop("position_ids", None)
        return model_inputs

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Give a text that folds the cache for it; leave the rest to the library."""
        rolling = bool(model_kwargs.get("rolling_memory"))
        if rolling:
            self._check_memories_to_come(generation_config.max_length, model_kwargs)
        plain = model_kwargs.get("memory_embeds") is None and model_kwargs.get("inputs_embeds") is None
        own_cache = rolling or (self.config.self_memory and plain) or self.config.text_start is not None
        own_cache = own_cache or self.config.window_positions
        dynamic = generation_config.use_cache is not False and generation_config.cache_implementation in (
            None,
            "dynamic",
        )
        if own_cache and dynamic and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = MemoryCache(rolling=rolling)
            return None
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)

    def _check_memories_to_come(self, max_length: int, model_kwargs: dict[str, Any]) -> None:
        """Refuse before the first step what could not be written to its end for want of room for memories."""
        config, mask = self.config, model_kwargs.get("attention_mask")
        if config.memory_policy not in ("error", "merge") or config.memory_capacity is None:
            return
        memory_mask = model_kwargs.get("memory_mask")
        num_context = 0 if memory_mask is None else int(memory_mask.sum(1).max())
        padding = 0 if mask is None else mask.shape[1] - int(mask.sum(1).max())
        num_tokens = max_length - padding - num_context
        # The last token is written and not read, and a window folds when the token behind it is read.
        num_folded = max(0, num_tokens - 2) // config.window_length
        num_memories = num_context + num_folded * config.memories_per_window
        if config.memory_policy == "merge":  # refuses what cannot be merged
            merge_plan(
                [],
                num_folded + 1,
                config.window_length // config.chunk_length,
                (config.memory_capacity - num_context) // config.memories_per_chunk,
                config.mergeable_chunks,
            )
        elif num_memories > config.memory_capacity:
            raise ValueError(
                f"Prompt and new tokens may fold into {num_memories} memories, but the model takes "
                f"{config.memory_capacity} (`max_memories` {config.max_memories}). Lower `max_new_tokens`, or let the "
                "oldest make room (`model.config.memory_policy = 'drop_oldest'`), or the least alike "
                "('keep_nearest'), or let old neighbours be merged ('merge')."
            )

    def create_masks_for_generate(self, attention_mask: torch.Tensor | None, **kwargs: Any) -> torch.Tensor | None:
        """Leave the mask as it is, 1 for tokens: the decoder makes its own of it, for a static cache too."""
        return attention_mask

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> LogitsProcessorList:
        processors = super()._get_logits_processor(*args, **kwargs)
        if self.config.memory_token_id is None:
            return processors
        return SlotlessLogitsProcessors(processors, self.config.memory_token_id)


class SlotlessLogitsProcessors(LogitsProcessorList):
    """Logits processors that never see a slot, whose id may be no row of the scores, and never let one be written.

    Args:
        processors (`LogitsProcessorList`): The processors to run.
        memory_token_id (`int`): The slot's id.
    """

    def __init__(self, processors: LogitsProcessorList, memory_token_id: int):
        super().__init__(processors)
        self.memory_token_id = memory_token_id

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.FloatTensor:
        """Process scores `(B, V)` of the texts `input_ids` `(B, T)`; a slot counts as the row's first token."""
        slots = input_ids == self.memory_token_id
        first = input_ids.gather(1, (~slots).long().argmax(1, keepdim=True))
        first = first.masked_fill(first == self.memory_token_id, 0)
        scores = super().__call__(torch.where(slots, first, input_ids), scores, **kwargs)
        if self.memory_token_id < scores.shape[-1]:
            scores = scores.index_fill(1, torch.tensor([self.memory_token_id], device=scores.device), -torch.inf)
        return scores
