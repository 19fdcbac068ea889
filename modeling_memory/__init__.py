"""Memory encoder-decoder language models: text read once into a few embeddings, for transformers.

Importing the package registers its models with the Auto classes, so that folders saved by it load without
`trust_remote_code`, and makes every `save_pretrained` write the code that others load with it.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoProcessor
from transformers.pipelines import PIPELINE_REGISTRY

from .configuration_masked_mixer import MaskedMixerConfig
from .configuration_memory import MemoryEncoderDecoderConfig
from .configuration_memory_autoencoder import MemoryAutoencoderConfig
from .memory_cache import MemoryCache
from .memory_embeds import embeds_to_base64, prompt_embeds
from .modeling_masked_mixer import MaskedMixerForCausalLM, MaskedMixerModel
from .modeling_memory import (
    MemoryCausalLMOutputWithPast,
    MemoryEncoderDecoderForCausalLM,
    MemoryEncoderDecoderModel,
    MemoryModelOutput,
)
from .modeling_memory_autoencoder import MemoryAutoencoder
from .pipeline_memory import TASK, MemoryQuestionAnswering, RememberedContexts
from .processing_memory import MemoryProcessor
from .store import Chunk, MemoryStore, MemoryStoreError, Passage, StoredText, quantization_report

__all__ = [
    "Chunk",
    "MaskedMixerConfig",
    "MaskedMixerForCausalLM",
    "MaskedMixerModel",
    "MemoryAutoencoder",
    "MemoryAutoencoderConfig",
    "MemoryCache",
    "MemoryCausalLMOutputWithPast",
    "MemoryEncoderDecoderConfig",
    "MemoryEncoderDecoderForCausalLM",
    "MemoryEncoderDecoderModel",
    "MemoryModelOutput",
    "MemoryProcessor",
    "MemoryQuestionAnswering",
    "MemoryStore",
    "MemoryStoreError",
    "Passage",
    "RememberedContexts",
    "StoredText",
    "embeds_to_base64",
    "prompt_embeds",
    "quantization_report",
]

__version__ = "0.1.0"


def _register() -> None:
    """Tell the Auto classes of every public class, and every public class of its Auto class."""
    families = (
        (MaskedMixerConfig, {AutoModel: MaskedMixerModel, AutoModelForCausalLM: MaskedMixerForCausalLM}),
        (MemoryAutoencoderConfig, {AutoModel: MemoryAutoencoder}),
        (
            MemoryEncoderDecoderConfig,
            {AutoModel: MemoryEncoderDecoderModel, AutoModelForCausalLM: MemoryEncoderDecoderForCausalLM},
        ),
    )
    for config_class, models in families:
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        config_class.register_for_auto_class()
        for auto_class, model_class in models.items():
            auto_class.register(config_class, model_class, exist_ok=True)
            model_class.register_for_auto_class(auto_class.__name__)
    AutoProcessor.register(MemoryEncoderDecoderConfig, MemoryProcessor, exist_ok=True)
    MemoryProcessor.register_for_auto_class()
    PIPELINE_REGISTRY.register_pipeline(TASK, MemoryQuestionAnswering, pt_model=AutoModelForCausalLM)


_register()
