"""Save tiny models and what they answer, as this version does: once a release, never again.

```bash
python -m tests.save_fixtures        # writes tests/saved/<version>/
```

`tests/test_saved.py` loads the folders of all releases with today's code and compares.
"""

import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, PreTrainedModel

import modeling_memory
from modeling_memory import (
    MaskedMixerForCausalLM,
    MemoryAutoencoder,
    MemoryAutoencoderConfig,
    MemoryEncoderDecoderConfig,
    MemoryEncoderDecoderForCausalLM,
    MemoryProcessor,
)
from tests.conftest import (
    build_tiny_encoder_tokenizer,
    build_tiny_tokenizer,
    tiny_decoder_config,
    tiny_encoder_config,
)
from tests.memory_models import BLANK, CHUNK, COPY, SLOT, WINDOW, ragged_batch, random_ids

SAVED = Path(__file__).parent / "saved"
WIDTH = 16
CODE = ("*.py", "__pycache__")


def build_models() -> dict[str, tuple[PreTrainedModel, object]]:
    """Every kind of model, with the fields away from their defaults."""
    torch.manual_seed(0)
    tokenizer = build_tiny_tokenizer()
    small = {"hidden_size": WIDTH, "intermediate_size": 32}
    mixer = tiny_encoder_config(**small)
    memory = MemoryEncoderDecoderConfig(
        encoder=mixer,
        decoder=tiny_decoder_config(**small, tie_word_embeddings=True),
        chunk_length=CHUNK,
        window_length=WINDOW,
        memories_per_chunk=2,
        pooling="mean",
        projector_type="mlp",
        projector_norm=True,
        window_positions=True,
        memory_token_id=SLOT,
        copy_token_id=COPY,
        blank_token_id=BLANK,
        initializer_range=0.3,
    )
    two = MemoryEncoderDecoderConfig(
        encoder=tiny_encoder_config("bert", **small),
        decoder=tiny_decoder_config("gpt_neox", **small),
        chunk_length=CHUNK,
        window_length=WINDOW,
        memory_token_id=SLOT,
        self_memory=False,
        initializer_range=0.3,
    )
    autoencoder = MemoryAutoencoderConfig(
        encoder=LlamaConfig(**tiny_encoder_config("llama", **small).to_dict()),
        decoder=mixer,
        chunk_length=CHUNK,
        memories_per_chunk=2,
    )
    lengths = {"chunk_length": CHUNK, "window_length": WINDOW}
    return {
        "memory": (
            MemoryEncoderDecoderForCausalLM(memory),
            MemoryProcessor(tokenizer, memories_per_chunk=2, **lengths),
        ),
        "two_tokenizers": (
            MemoryEncoderDecoderForCausalLM(two),
            MemoryProcessor(tokenizer, build_tiny_encoder_tokenizer(), **lengths),
        ),
        "autoencoder": (MemoryAutoencoder(autoencoder), tokenizer),
        "mixer": (MaskedMixerForCausalLM(tiny_encoder_config(**small, num_heads=0, kernel_size=2)), tokenizer),
    }


def ask(name: str, model: PreTrainedModel, processor: object) -> dict[str, torch.Tensor]:
    """What a model answers to inputs that never change: logits, generated ids, memories."""
    with torch.no_grad():
        if name == "autoencoder":
            input_ids = random_ids(3, CHUNK)
            return {
                "memories": model.encode(input_ids),
                "logits": model(input_ids).logits,
                "reconstructed": model.reconstruct(input_ids),
            }
        if name == "mixer":
            input_ids = random_ids(2, 13)
            return {
                "logits": model(input_ids).logits,
                "generated": model.generate(input_ids, max_new_tokens=6, do_sample=False),
            }
        answers = {}
        context = "a man in the sand and the sea"
        request = processor(text=["the rest", "it"], context=[context, "a"], padding_side="left", return_tensors="pt")
        answers.update({f"processor.{key}": tensor for key, tensor in request.items()})
        answers["slots"] = model(**request).logits
        answers["generated"] = model.generate(**request, max_new_tokens=6, do_sample=False)
        if name == "memory":
            input_ids, attention_mask = ragged_batch()
            answers["plain"] = model(input_ids, attention_mask).logits * attention_mask[..., None]
            copied = torch.cat([random_ids(1, 2 * WINDOW), torch.full((1, 3), COPY)], 1)
            answers["copied"] = model(copied).logits
            answers["rolled"] = model.generate(random_ids(1, WINDOW + 5), max_new_tokens=WINDOW, do_sample=False)
        return answers


def main() -> int:
    """Write the folder of this version; refuses to change one that is there."""
    target = SAVED / modeling_memory.__version__
    if target.exists():
        print(f"error: {target} is there; what a release saved does not change", file=sys.stderr)
        return 2
    for name, (model, processor) in build_models().items():
        folder = target / name
        model.eval().save_pretrained(folder)
        processor.save_pretrained(folder)
        for pattern in CODE:  # what is tested is today's code on yesterday's files
            for path in folder.glob(pattern):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        answers = {key: tensor.contiguous() for key, tensor in ask(name, model, processor).items()}
        save_file(answers, folder / "expected.safetensors")
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    print(f"{target.relative_to(SAVED.parent)}: {size / 1e3:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
