"""Parts d and e: the real pair, trained for three minutes by its recipe, and what its memories save.

Part d goes on from the weights in `model_cards/starter-smollm2` by the stages of the recipe
`smollm2`, in bfloat16 and batches of a GPU's size. The first stage is short; how fast it was says how many steps the
last one can have, so that its rates fall to zero when the time ends.
"""

import shutil
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoTokenizer

from benchmarks.gpu.bundle import packed, read_tokens
from benchmarks.gpu.job import Job, Numbers, finish, free_memory, peak_gib
from benchmarks.measure import cache_bytes
from modeling_memory import MemoryEncoderDecoderForCausalLM
from modeling_memory.memory_adapters import adapters_on
from training.data.tokenizer import complete_tokenizer, special_tokens_of
from training.recipes.recipe import PretrainedRecipe, Recipe, find_recipe, load_recipe
from training.recipes.strict_yaml import parse_yaml
from training.records.record import data_digest, read_json, write_json
from training.train.inputs import Inputs, byte_lengths_of
from training.train.stages import StageRunner

RATE = 4
LENGTHS = (16384, 65536)
FIRST_STEPS = 40
# Loading, validation and saving, seconds beside the steps themselves.
BESIDE = 35.0


def pair_recipe(job: Job, steps: dict[str, int], base: dict[str, Any]) -> Recipe:
    """Return the recipe `smollm2` from its warm start on, in the sizes of a GPU.

    Args:
        job (`Job`): Its payload has the warm start and the questions.
        steps (`dict`): Stage -> its optimizer steps.
        base (`dict`): Path and file of the decoder, as the payload names them.
    """
    asked = find_recipe("smollm2")
    mapping = parse_yaml(asked.read_text(encoding="utf-8"), "smollm2")
    mapping["pretrained"] = {"smollm2": mapping["pretrained"]["smollm2"] | base}
    mapping["pretrained"]["warm"] = {"path": str(job.payload / "warm"), "tokenizer": "shared"}
    mapping["tokenizer"] |= base
    mapping["use_cpu"] = job.device.type == "cpu"
    mapping["publish"] = {"stage": "questions"}
    mapping["stages"] = [stage for stage in mapping["stages"] if stage["name"] in steps]
    for stage in mapping["stages"]:
        name, training, own = stage["name"], stage["training"], steps[stage["name"]]
        if name == "four":
            stage["from"] = {"model": "warm"}
            for key in ("model", "warm_start", "adapters"):  # the warm start has them
                stage.pop(key, None)
        else:
            for split in ("questions", "validation_questions"):
                stage["data"][split] = [str(job.payload / f"{split}.jsonl")]
        training |= {
            "max_steps": own, "batch_size": 8 if job.toy else 64, "bf16": not job.toy, "eval_steps": own,
            "eval_rows": 8 if job.toy else 128, "logging_steps": max(1, min(20, own // 8)), "save_steps": None,
        }  # fmt: skip
    file = job.folder / "pair" / "recipe.yaml"
    write_json(file, mapping)  # JSON is YAML
    return load_recipe(file)


def pair_inputs(job: Job, recipe: Recipe) -> Inputs:
    """Return the text that travelled as tokens, as a run has it."""
    source = PretrainedRecipe(recipe.tokenizer.path, gguf_file=recipe.tokenizer.gguf_file)
    tokenizer = complete_tokenizer(AutoTokenizer.from_pretrained(source.source, **source.options))
    tokens = {split: read_tokens(job.payload, f"pair_{split}") for split in ("train", "validation")}
    described = {"files": packed(job.payload), "tokens": {split: len(one) for split, one in tokens.items()}}
    special = special_tokens_of(tokenizer, recipe.tokenizer.copy_token, recipe.tokenizer.blank_token)
    return Inputs(
        tokenizer, special, {**tokens, "test": tokens["validation"]}, byte_lengths_of(tokenizer), described,
        data_digest(described),
    )  # fmt: skip


def train_pair(job: Job) -> Numbers:
    """Run both stages; returns their entries for the record, and leaves the adapters in `weights/pair`."""
    base = packed(job.payload)["base"]
    steps = {"four": 2, "questions": 2} if job.toy else {"four": FIRST_STEPS, "questions": 100}
    recipe = pair_recipe(job, steps, base)
    inputs = pair_inputs(job, recipe)

    def run(recipe: Recipe, name: str) -> Numbers:
        runner = StageRunner(recipe, job.folder / "pair" / "stages", inputs)
        stage = recipe.stage(name)
        done = runner.finished(stage) or runner.run(stage)
        job.note(f"stage {name}", done)
        return done

    PartialState(cpu=job.device.type == "cpu")
    first = run(recipe, "four")
    free_memory(job.device)
    last_folder, kept = job.folder / "pair" / "stages" / "questions", job.folder / "pair" / "steps.json"
    if (last_folder / "stage.json").is_file():
        steps = read_json(kept)
    else:
        shutil.rmtree(last_folder, ignore_errors=True)  # begun for another number of steps, and no checkpoint is kept
        if not job.toy:
            each = first["seconds"] / FIRST_STEPS * 1.1  # the stage with questions reads more
            steps["questions"] = max(20, int((job.left() - BESIDE) / each))
        write_json(kept, steps)
    last = run(pair_recipe(job, steps, base), "questions")
    keep_trained(job.payload / "warm", last_folder / "model", job.folder / "weights" / "pair")
    ends = [log for log in last["series"] if "eval_copy_loss" in log][-1:]
    speed = {name: done["text_tokens_per_second"] for name, done in (("four", first), ("questions", last))}
    return {"steps": steps, "tokens_per_second": speed, "validation": ends, "peak_gib": peak_gib(job.device)}


def keep_trained(warm: Path, stage: Path, folder: Path) -> None:
    """Write what was trained, in bfloat16, as the folder by reference that it began as.

    Args:
        warm (`Path`): The first weights: their config names the package, their tensors are what is trained.
        stage (`Path`): A stage's model, whole.
        folder (`Path`): Where it goes.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with safe_open(warm / "trained.safetensors", framework="pt") as first:
        names = list(first.keys())
    with safe_open(stage / "model.safetensors", framework="pt") as whole:
        tensors = {name: whole.get_tensor(name).to(torch.bfloat16) for name in names}
    save_file(tensors, folder / "trained.safetensors", metadata={"format": "pt"})
    shutil.copyfile(warm / "config.json", folder / "config.json")


def train(job: Job) -> None:
    """Measure part d."""
    job.measure("training", partial(train_pair, job))


# ---------------------------------------------------------------------------------------------------------------------


def pair_model(job: Job) -> Any:
    """Load the pair in bfloat16, with the weights of part d if they are there."""
    trained = job.folder / "weights" / "pair"
    folder = trained if trained.is_dir() else job.payload / "warm"
    job.note("weights", "of part d" if folder == trained else "first weights of the pair")
    return MemoryEncoderDecoderForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(job.device).eval()


@torch.no_grad()
def answer(job: Job, read: Callable[[], Any], step: Callable[[Any, torch.Tensor], Any], steps: int) -> Numbers:
    """Time a text's first token and the steps after it; the best of three readings, the first to warm up.

    Args:
        job (`Job`): Its device.
        read (`Callable`): Reads all that stands in front of the answer.
        step (`Callable`): Reads one token `(1, 1)` more, given the cache.
        steps (`int`): Tokens after the first.
    """
    firsts, each, outputs = [], [], None
    for _ in range(3):
        outputs = None  # or two caches would lie in memory
        finish(job.device)
        started = time.perf_counter()
        outputs = read()
        token = outputs.logits[:, -1:].argmax(-1)
        token.tolist()  # as whoever streams it would read it
        firsts.append(time.perf_counter() - started)
    size = cache_bytes(outputs.past_key_values)
    for _ in range(steps):
        finish(job.device)
        started = time.perf_counter()
        outputs = step(outputs.past_key_values, token)
        token = outputs.logits[:, -1:].argmax(-1)
        token.tolist()
        each.append(time.perf_counter() - started)
    return {"first_token_seconds": min(firsts[1:]), "step_seconds": statistics.median(each), "cache_bytes": size}


@torch.no_grad()
def measure_length(job: Job, model: Any, length: int) -> Numbers:
    """One length of text: as memories of 4 tokens that lie ready in main memory, and as full text."""
    config, device, steps = model.config, job.device, 2 if job.toy else 32
    high = min(40_000, config.decoder.vocab_size)
    ids = torch.randint(high // 2, high, (1, length), generator=torch.Generator().manual_seed(0)).to(device)
    question = ids[:, :12]
    chunks = ids.view(1, -1, config.chunk_length)
    budget = torch.full(chunks.shape[:2], config.chunk_length // RATE, device=device)
    memories, _, stands_for = model.encode_memories(chunks, num_memories=budget, return_num_tokens=True)
    stored = memories.cpu()
    prompt = torch.cat([torch.full(stored.shape[:2], config.memory_token_id, device=device), question], 1)
    own = config.decoder.max_position_embeddings
    # Rotary positions have no table; beyond what the decoder was trained for only times mean something.
    config.decoder.max_position_embeddings = max(own, length + 256)
    again = {"use_cache": True, "logits_to_keep": 1}
    try:
        found = {
            "stored memories": answer(
                job,
                lambda: model(prompt, memory_embeds=stored.to(device), memory_num_tokens=stands_for, **again),
                lambda cache, token: model(token, past_key_values=cache, use_cache=True),
                steps,
            )
        }
        free_memory(device)
        with adapters_on(model.decoder, False):
            found["full text"] = answer(
                job,
                lambda: model.decoder(torch.cat([ids, question], 1), **again),
                lambda cache, token: model.decoder(token, past_key_values=cache, use_cache=True),
                steps,
            )
    finally:
        config.decoder.max_position_embeddings = own
    times = {
        name: found["full text"][name] / found["stored memories"][name]
        for name in ("first_token_seconds", "step_seconds", "cache_bytes")
    }
    return {**found, "full_text_over_memories": times, "memories": stored.shape[1], "beyond_positions": length > own}


def read(job: Job) -> None:
    """Measure part e."""
    model = pair_model(job)
    for length in (64, 128) if job.toy else LENGTHS:
        job.measure(f"{length} tokens", partial(measure_length, job, model, length))
