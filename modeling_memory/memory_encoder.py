"""From chunks to memory states: one batched call of an encoder body, and a pooling of what it gives.

Letters: N chunks, L columns of a chunk, K memories per chunk, E encoder width.
"""

import inspect
from contextlib import nullcontext

import torch
from torch import nn
from transformers import AutoModel, AutoModelForTextEncoding
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from .configuration_memory import encoder_limit
from .memory_parts import check_text_encoder
from .modeling_masked_mixer import MaskedMixerModel, check_attention_mask, check_token_ids

# By name, not through the Auto registry: in a folder loaded with `trust_remote_code` the registry holds other copies.
BODIES = {"masked_mixer": MaskedMixerModel}


def build_encoder(config: PreTrainedConfig) -> PreTrainedModel:
    """Build a fresh body, without language modelling head or pooling layer, of any model type.

    Args:
        config (`PreTrainedConfig`): Its architecture.

    Returns:
        `PreTrainedModel`: A masked mixer, the encoder of a T5, or what `AutoModel.from_config` gives.

    Raises:
        ValueError: If the model has an encoder and a decoder of its own that the library cannot part.
    """
    if config.model_type in BODIES:
        return BODIES[config.model_type]._from_config(config)
    if getattr(config, "is_encoder_decoder", False):
        check_text_encoder(config)
    # The encoder of a T5 says in its config that it is no encoder-decoder, and yet AutoModel would build both.
    auto_class = AutoModelForTextEncoding if type(config) in AutoModelForTextEncoding._model_mapping else AutoModel
    body = auto_class.from_config(config)
    if getattr(body, "pooler", None) is not None:
        body.pooler = None  # what is read are the states of the tokens
    return body


def encode_chunks(
    encoder: PreTrainedModel,
    pooling: nn.Module,
    input_ids: torch.LongTensor,
    attention_mask: torch.Tensor | None = None,
    num_memories: torch.Tensor | None = None,
    checked: bool = False,
) -> torch.Tensor:
    """Turn chunks into memory states: one batched encoder call, then the pooling.

    A frozen encoder keeps nothing for a backward pass; the pooling is trained all the same.

    Every chunk is read from position 0: padding in front of tokens is moved behind them first, since not every encoder
    counts positions by its mask.

    Args:
        encoder (`PreTrainedModel`): A body that returns `last_hidden_state`.
        pooling (`nn.Module`): From [`build_pooling`].
        input_ids (`torch.LongTensor` of shape `(N, L)`): Token ids of the chunks.
        attention_mask (`torch.Tensor` of shape `(N, L)`, *optional*): 1 for tokens, 0 for padding, anywhere. A chunk
            of padding only gives finite states, to be masked by the caller.
        num_memories (`torch.LongTensor` of shape `(N,)`, *optional*): Memories of each chunk, 1 to K. Default: K.
        checked (`bool`): Whether the caller has looked at ids and mask, so that the device is not asked again.

    Returns:
        `torch.Tensor` of shape `(N, K, E)`: the memory states.

    Raises:
        ValueError: If shapes differ, an id is outside the encoder's vocabulary, or a chunk is longer than it takes.
    """
    config = encoder.config
    if not checked:
        check_token_ids("input_ids", input_ids, getattr(config, "vocab_size", None), "the encoder")
        limit = encoder_limit(config)
        if limit is not None and input_ids.shape[1] > limit:
            raise ValueError(
                f"A chunk has {input_ids.shape[1]} tokens, but the encoder takes {limit}. Cut the text into shorter "
                "chunks."
            )
        check_attention_mask("attention_mask", attention_mask, *input_ids.shape)
    if attention_mask is None:
        real, visible = torch.ones_like(input_ids), None  # a mask of ones would be read to find that out
    else:
        real = (attention_mask != 0).long()
        order = torch.argsort(1 - real, dim=1, stable=True)
        input_ids, real = input_ids.gather(1, order), real.gather(1, order)
        # Attention over nothing is not a number, so a chunk of padding only reads its padding.
        visible = torch.where(real.any(1, keepdim=True), real, torch.ones_like(real))
    options = {"use_cache": False} if "use_cache" in inspect.signature(encoder.forward).parameters else {}
    trained = any(parameter.requires_grad for parameter in encoder.parameters())  # adapters, for example
    with nullcontext() if trained else torch.no_grad():
        outputs = encoder(input_ids=input_ids, attention_mask=visible, return_dict=True, **options)
    return pooling(outputs.last_hidden_state, real, num_memories)
