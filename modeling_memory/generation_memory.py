"""Generation with memories: a context is read once, and full windows become memories while the text grows."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.configuration_utils import PreTrainedConfig
from transformers.generation import GenerationConfig, GenerationMixin
from transformers.generation.logits_process import LogitsProcessorList

from .memory_cache import MemoryCache, mark_of
from .memory_checks import (
    Call,
    check_capacity,
    check_memories,
    check_owners,
    check_positions,
    check_rolling,
    check_text,
    check_view,
)
from .memory_layout import Text, tokens_of_memories


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

        While a model trains under activation checkpointing, which keeps no cache, it generates without that.

        Args:
            inputs (`torch.LongTensor` of shape `(B, T)`, *optional*): Prompt, also as `input_ids`; padded on the left.
            generation_config (`GenerationConfig`, *optional*): As in the library.
            args: As in the library.
            context_input_ids (`torch.LongTensor` of shape `(B, C, L)`, *optional*): Chunks of a context; encoded once.
            context_attention_mask (`torch.LongTensor` of shape `(B, C, L)`, *optional*): 1 for tokens, 0 for padding.
            context_num_memories (`torch.LongTensor` of shape `(B, C)`, *optional*): Memories of each chunk.
            rolling_memory (`bool`, *optional*): Whether a window that fills up while writing becomes memories; if
                not, it grows on. Default: `config.self_memory` for plain text, no after memories, where True
                compresses what follows the last slot.
            kwargs: As in the library; `memory_embeds`, `memory_mask` and `memory_num_tokens` are ready memories for
                the prompt's slots, or with `inputs_embeds` before them.

        Returns:
            What the library returns: prompt and new tokens, or a generation output.

        Raises:
            ValueError: If an option cannot be right with memories, a prompt is padded on the right, or the decoder has
                no room for what may be written.
        """
        input_ids = inputs if inputs is not None else kwargs.get("input_ids")
        embeds = kwargs.get("inputs_embeds")
        tokens = embeds if input_ids is None else input_ids
        call = Call(
            Text(input_ids, kwargs.get("attention_mask"), embeds, tokens=tokens), context_input_ids,
            context_attention_mask, context_num_memories, kwargs.get("memory_embeds"), kwargs.get("memory_mask"),
            kwargs.get("memory_num_tokens"),
            has_memories=context_input_ids is not None or kwargs.get("memory_embeds") is not None,
        )  # fmt: skip
        _check_prompt(call.text, kwargs.get("past_key_values"), rolling_memory)
        check_owners(call)
        if call.has_memories:
            if tokens is not None:
                check_memories(self.config, call)
            kwargs.update(memories_of_prompt(self, call))
        has_ids = embeds is None
        if rolling_memory:
            check_rolling(self.config, has_ids)
        plain = has_ids and not call.has_memories
        rolling = bool(self.config.self_memory and plain if rolling_memory is None else rolling_memory)
        # With embeddings the library passes empty ids on, which hold nothing to check.
        if input_ids is not None and (has_ids or 0 not in input_ids.shape):
            check_padding_side(self.config, input_ids, kwargs.get("attention_mask"))
        check_generation_options(self.config, generation_config or self.generation_config, kwargs, input_ids, rolling)
        if has_ids and input_ids is not None:
            # Read once here: later every step of the library would have to look at the prompt on the device again.
            kwargs["prompt_columns"] = columns_of_prompt(self.config, input_ids, call.has_memories)
        # Called inside a training loop, as by callbacks that show samples.
        with without_checkpointing(self):
            return super().generate(inputs, generation_config, *args, rolling_memory=rolling, **kwargs)

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: continuous batching pages keys and values of its own, and knows no memories.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "`generate_batch` and continuous batching keep keys and values in pages of their own, in which memories "
            "have no place. Call `generate` with a batch that is padded on the left."
        )

    init_continuous_batching = continuous_batching_context_manager = generate_batch

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        memory_embeds: torch.Tensor | None = None,
        memory_mask: torch.Tensor | None = None,
        memory_num_tokens: torch.Tensor | None = None,
        rolling_memory: bool | None = None,
        prompt_columns: tuple[int, ...] | None = None,
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
        # In every step, since an open window grows on or is compressed by it.
        model_inputs["rolling_memory"] = rolling_memory
        if memory_embeds is not None and (is_first_iteration or not use_cache):
            model_inputs.update(
                memory_embeds=memory_embeds, memory_mask=memory_mask, memory_num_tokens=memory_num_tokens
            )
        mask = model_inputs.get("attention_mask")
        # Those of the library count columns, and a memory is none of the text's.
        if mask is None or mask.dim() == 2:  # the model derives positions itself: they depend on memories
            model_inputs.pop("position_ids", None)
        if not is_first_iteration and use_cache and past_key_values is not None:
            # New tokens are never padding. A cache that knows what it holds needs no mask, which the library would
            # have to read on the device at every step.
            mark = None if past_key_values.is_compileable else mark_of(past_key_values)
            if isinstance(past_key_values, MemoryCache) or (mark is not None and not mark.has_gaps):
                model_inputs["attention_mask"] = None
        return model_inputs

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Give a text the cache that it needs; leave the rest to the library."""
        rolling = bool(model_kwargs.get("rolling_memory"))
        check_room_to_come(self, generation_config.max_length, model_kwargs, rolling)
        embeds, num_columns = model_kwargs.get("inputs_embeds"), (model_kwargs.get("prompt_columns") or (1,))[0]
        has_memories = model_kwargs.get("memory_embeds") is not None
        dynamic = generation_config.use_cache is not False and generation_config.cache_implementation in (
            None,
            "dynamic",
        )
        needs_own = needs_own_cache(self.config, has_memories, embeds is None, num_columns, rolling)
        if needs_own and dynamic and model_kwargs.get("past_key_values") is None:
            # Made before the first step: the prompt's own call would give one only if the library had none.
            model_kwargs["past_key_values"] = MemoryCache(rolling=rolling)
            return None
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)

    def create_masks_for_generate(self, attention_mask: torch.Tensor | None, **kwargs: Any) -> torch.Tensor | None:
        """Leave the mask as it is, 1 for tokens: the decoder makes its own of it, for a static cache too."""
        return attention_mask

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> LogitsProcessorList:
        # Around all others, since a penalty for repetition looks up the score of every id in the prompt.
        processors = super()._get_logits_processor(*args, **kwargs)
        if self.config.memory_token_id is None:
            return processors
        return SlotlessLogitsProcessors(processors, self.config.memory_token_id)


def memories_of_prompt(model: Any, call: Call) -> dict[str, torch.Tensor]:
    """Encode the context of a prompt once, and give every row of the prompt its memories."""
    embeds, mask, num_tokens = call.memory_embeds, call.memory_mask, call.memory_num_tokens
    if call.context_input_ids is not None:
        embeds, mask, num_tokens = model.encode_memories(
            call.context_input_ids, call.context_attention_mask, call.context_num_memories, return_num_tokens=True
        )
    if mask is None and isinstance(embeds, torch.Tensor):
        mask = torch.ones_like(embeds[..., 0], dtype=torch.long)
    given = {"memory_embeds": embeds, "memory_mask": mask, "memory_num_tokens": num_tokens}
    tokens = call.text.tokens
    if isinstance(embeds, torch.Tensor) and len(embeds) == 1 and isinstance(tokens, torch.Tensor):
        given = {
            name: None if value is None else value.expand(len(tokens), *value.shape[1:])
            for name, value in given.items()
        }
    return {name: value for name, value in given.items() if value is not None}


def columns_of_prompt(config: PreTrainedConfig, input_ids: torch.Tensor, has_memories: bool) -> tuple[int, ...]:
    """Return the columns of a prompt, and if it has memories the numbers of the first and the last with a slot."""
    if not has_memories or config.memory_token_id is None:
        return (input_ids.shape[1],)
    slots = (input_ids == config.memory_token_id).any(0).nonzero().flatten().tolist()
    return (input_ids.shape[1], slots[0], slots[-1]) if slots else (input_ids.shape[1],)


def needs_own_cache(
    config: PreTrainedConfig, has_memories: bool, has_ids: bool, num_columns: int, rolling: bool
) -> bool:
    """Whether later steps need what only a [`MemoryCache`] knows."""
    if rolling or config.memory_positions in ("fixed", "spread"):
        return True
    if has_memories:
        return config.window_positions or config.memory_positions == "source" or not has_ids
    return config.self_memory and has_ids and num_columns > config.window_length


def check_generation_options(
    config: PreTrainedConfig,
    stored: GenerationConfig,
    kwargs: dict[str, Any],
    input_ids: torch.Tensor | None,
    rolling: bool,
) -> None:
    """Refuse options of `generate` that cannot be right, and say what can be done instead."""
    settings = {name: value for name, value in kwargs.items() if value is not None}

    def option(name: str) -> Any:
        return settings.get(name, getattr(stored, name, None))

    assistant = "assistant_model" if "assistant_model" in settings else "assistant_early_exit"
    if option(assistant) is not None:
        raise ValueError(
            f"`{assistant}` was given, but an assistant does not see the memories and its rejected tokens cannot "
            "be taken out of them. Generate without it."
        )
    if option("prefill_chunk_size") is not None:
        raise ValueError(
            f"`prefill_chunk_size` is {option('prefill_chunk_size')}, but a prompt cut at arbitrary columns loses "
            "its slots and windows. Leave it out: the windows are short already."
        )
    has_ids, has_memories = "inputs_embeds" not in settings, "memory_embeds" in settings
    if option("use_cache") is False and not has_ids:
        raise ValueError(
            "`inputs_embeds` were given with `use_cache=False`, but later steps know only the new tokens. Leave "
            "`use_cache` out, or give `input_ids`."
        )
    if option("use_cache") is False and has_ids and not has_memories and not rolling and config.self_memory:
        raise ValueError(
            "`rolling_memory` is False and so is `use_cache`, but with no cache every step reads all text and "
            "compresses its full windows. Leave one of them out."
        )
    num_columns = 0 if input_ids is None else input_ids.shape[-1]
    if not needs_own_cache(config, has_memories, has_ids, num_columns, rolling):
        return
    remedy = "Leave it out."
    if rolling and not needs_own_cache(config, has_memories, has_ids, num_columns, False):
        remedy = "Leave it out, or pass `rolling_memory=False`."
    elif not has_memories and config.memory_positions not in ("fixed", "spread"):
        remedy = "Leave it out, or give a prompt of one window and `rolling_memory=False`."
    if option("prompt_lookup_num_tokens") is not None:
        raise ValueError(
            f"`prompt_lookup_num_tokens` is {option('prompt_lookup_num_tokens')}, but rejected tokens cannot be "
            f"taken out of a memory. {remedy}"
        )
    # Static and offloaded caches hold keys and values only, not the tokens of a window that will be compressed.
    if option("cache_implementation") not in (None, "dynamic"):
        raise ValueError(
            f"`cache_implementation` is {option('cache_implementation')!r}, but this text needs a cache that "
            f"knows its memories. {remedy}"
        )


def check_padding_side(config: PreTrainedConfig, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
    """Refuse a prompt that is none, or that ends in padding."""
    if not isinstance(input_ids, torch.Tensor):
        raise ValueError(
            f"The prompt is a {type(input_ids).__name__}; expected a torch tensor of (batch, tokens). Use "
            "`return_tensors='pt'` when tokenising."
        )
    if input_ids.dim() != 2 or 0 in input_ids.shape:
        raise ValueError(
            f"The prompt has shape {tuple(input_ids.shape)}; expected (batch, tokens), none of them 0. Give at "
            "least one token."
        )
    if attention_mask is None:
        pad, eos = config.pad_token_id, config.eos_token_id
        if pad is None or pad in (eos if isinstance(eos, list) else [eos]):
            return
        # The library makes its own mask from pad ids where none is given.
        padded = input_ids[:, -1] == pad
    elif isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2:
        padded = attention_mask[:, -1] == 0
    else:
        given = tuple(getattr(attention_mask, "shape", ())) or f"a {type(attention_mask).__name__}"
        raise ValueError(
            f"`attention_mask` of the prompt is {given}; expected a torch tensor of {tuple(input_ids.shape)}, 1 "
            "for tokens and 0 for padding. Use `return_tensors='pt'` when tokenising."
        )
    if padded.any():
        raise ValueError(
            f"Row {int(padded.nonzero()[0])} of the prompt ends in padding, and the next token would be drawn "
            "from it. Pad on the left: `tokenizer.padding_side = 'left'`."
        )


def check_room_to_come(model: Any, max_length: int, model_kwargs: dict[str, Any], rolling: bool) -> None:
    """Refuse before the first step what could not be written to its end for want of room or positions."""
    config, mask = model.config, model_kwargs.get("attention_mask")
    embeds, memory_mask = model_kwargs.get("inputs_embeds"), model_kwargs.get("memory_mask")
    num_context = 0 if memory_mask is None else int(memory_mask.sum(1).max())
    if embeds is not None:  # whose columns the library does not count
        max_length = max_length + embeds.shape[1]
    padding = 0 if mask is None else mask.shape[1] - int((mask != 0).sum(1).max())
    num_columns = max_length - 1 - padding  # the last token is written and not read
    slots = (model_kwargs.get("prompt_columns") or (1,))[1:]
    if rolling:
        ahead = slots[1] + 1 - padding if slots else 0  # up to the last slot, whatever is compressed
        num_compressed = max(0, num_columns - num_context - 1) // config.window_length
        num_memories = num_context + num_compressed * config.memories_per_window
        capacity = config.memory_capacity
        if config.memory_policy == "error" and capacity is not None and num_memories > capacity:
            raise ValueError(
                f"Prompt and new tokens may become {num_memories} memories, but the model takes {capacity} "
                f"(`max_memories` {config.max_memories}). Lower `max_new_tokens`, or let the oldest make room "
                "(`model.config.memory_policy = 'drop_oldest'`)."
            )
        num_memories = num_memories if capacity is None else min(num_memories, capacity)
        end = max(ahead, num_context) - num_context + num_memories + min(config.window_length, num_columns)
        # Memories of source positions take as many as their tokens did: compressing frees none.
        end = num_columns if config.memory_positions == "source" else end
    elif embeds is not None:
        check_capacity(config, num_context)
        end = num_columns + num_context
    else:
        end = num_columns
    if config.memory_positions in ("fixed", "spread"):
        end = config.text_start + (min(config.window_length, num_columns) if rolling else num_columns - num_context)
    elif config.memory_positions == "source" and memory_mask is not None:
        num_tokens = model_kwargs.get("memory_num_tokens")
        if num_tokens is None:
            num_tokens = tokens_of_memories(config, memory_mask.shape[1], memory_mask.device)
        more = num_tokens * memory_mask  # (B, M): what the memories take beyond their own columns
        more = more.sum(1) if embeds is not None else (more - memory_mask).sum(1)
        end = num_columns + int(more.max())
    check_positions(model.decoder, end)
    if not rolling and num_context and (slots or embeds is not None):
        check_view(config, num_columns + padding - slots[0] if slots else num_columns + num_context)


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
        if input_ids.shape[1] == 0:  # a prompt of embeddings, and nothing written yet
            scores = super().__call__(input_ids, scores, **kwargs)
            return self._without_slot(scores)
        slots = input_ids == self.memory_token_id
        first = input_ids.gather(1, (~slots).long().argmax(1, keepdim=True))
        first = first.masked_fill(first == self.memory_token_id, 0)
        return self._without_slot(super().__call__(torch.where(slots, first, input_ids), scores, **kwargs))

    def _without_slot(self, scores: torch.FloatTensor) -> torch.FloatTensor:
        if self.memory_token_id < scores.shape[-1]:
            # A slot that was written would ask for a memory that nobody gave.
            scores = scores.index_fill(1, torch.tensor([self.memory_token_id], device=scores.device), -torch.inf)
        return scores


@contextmanager
def without_checkpointing(model: Any) -> Iterator[None]:
    """Switch activation checkpointing off inside this context: it keeps no cache, and nothing is to be recomputed."""
    switched = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    for module in switched:
        module.gradient_checkpointing = False
    try:
        yield
    finally:
        for module in switched:
            module.gradient_checkpointing = True


def _check_prompt(text: Text, cache: Any, rolling_memory: Any) -> None:
    """Refuse a prompt that the library would cut to fit, or fail on inside."""
    if rolling_memory is not None and not isinstance(rolling_memory, bool):
        raise ValueError(f"`rolling_memory` is {rolling_memory!r}; expected True, False, or None for the default.")
    if cache is not None and not isinstance(cache, Cache):
        raise ValueError(
            f"`past_key_values` is a {type(cache).__name__}; expected a `Cache` of an earlier call, or None."
        )
    if text.tokens is not None and cache is None:
        embeds = text.inputs_embeds
        check_text(text if embeds is None else Text(None, text.attention_mask, embeds, tokens=embeds), None)
