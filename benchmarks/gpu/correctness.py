"""Part a: on this device the fast path is the plain loop, whatever computes it.

Weights are random and small, so the whole part takes a minute. float32 is compared with TF32 off; bfloat16 by the norm
of the difference from the float32 loop, beside that of the plain loop itself in bfloat16: rounding is no fault, more
rounding than the loop's would be one.
"""

import copy
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from transformers.utils import import_utils

from benchmarks.gpu.job import Job, Numbers
from benchmarks.house import looks_of
from benchmarks.measure import assert_equal
from benchmarks.speed import Sizes, build_model, random_tokens
from modeling_memory import MemoryProcessor, MemoryStore
from tests.reference import memory_loop
from training.data.tokenizer import train_tokenizer
from training.train.trainer import compile_blocks

# float32 sums in another order: 1e-4 of the largest value; four windows deep, gradients included.
FLOAT_TOLERANCE = 1e-4
# bfloat16 keeps 8 bits: the fast path may be off the float32 loop by so many times what the bfloat16 loop is.
HALF_FACTOR = 2.0
TEXT = "The sea was calm, and the boats lay in a row. Nobody came to the harbour before noon. "
KERNELS = {
    "sdpa": lambda: True,
    "flash_attention_2": import_utils.is_flash_attn_2_available,
    "flash_attention_3": import_utils.is_flash_attn_3_available,
    "flex_attention": import_utils.is_torch_flex_attn_available,
}


def sizes_of(toy: bool) -> Sizes:
    """Return what part a builds: widths that every kernel takes, windows enough to show a wrong mask."""
    small = Sizes(
        hidden_size=32, intermediate_size=64, encoder_layers=1, decoder_layers=2, num_heads=2, vocab_size=300,
        chunk_length=4, window_length=8, max_position_embeddings=128, train_batch=2, train_windows=3,
        prompt_length=12, new_tokens=10,
    )  # fmt: skip
    return small if toy else Sizes(num_heads=4, vocab_size=300, train_batch=4, train_windows=4, new_tokens=80)


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """Go backward from a loss; return it with all gradients, in float32."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    found = {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach().float(), **found}


def fast_step(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Loss and gradients of texts `(B, T)` by the model."""
    return gradients(model, model(ids, labels=ids, use_cache=False).loss)


def plain_step(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Loss and gradients of texts `(B, T)` by the loop, which makes its tensors on the device that it is told."""
    with torch.device(ids.device):
        return gradients(model, memory_loop.causal_loss(model, ids))


def off(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Norm of the difference of two results, as a share of the second's norm."""
    pairs = [(value, other[name].to(value)) for name, value in one.items()]
    apart = torch.stack([(a - b).square().sum() for a, b in pairs]).sum().sqrt()
    return (apart / torch.stack([b.square().sum() for _, b in pairs]).sum().sqrt()).item()


def check_steps(model: Any, ids: torch.Tensor) -> Numbers:
    """Loss and gradients over several windows, float32 and bfloat16."""
    plain = plain_step(model, ids)
    found: Numbers = {"float32": assert_equal(fast_step(model, ids), plain, tolerance=FLOAT_TOLERANCE)}
    half = copy.deepcopy(model).to(torch.bfloat16)
    errors = {"fast": off(fast_step(half, ids), plain), "loop": off(plain_step(half, ids), plain)}
    if not errors["fast"] <= HALF_FACTOR * errors["loop"] + 1e-3:
        raise ValueError(f"in bfloat16 the fast path is {errors['fast']:.2e} off the float32 loop, {errors}")
    return {**found, "bfloat16": errors}


def check_kernel(model: Any, ids: torch.Tensor, name: str) -> Numbers:
    """Logits in bfloat16 by one kind of attention against eager attention, beside what bfloat16 costs eager itself."""
    if not KERNELS[name]():
        return {"missing": f"{name} is not installed here"}
    if name != "sdpa" and ids.device.type == "cpu":
        return {"missing": f"{name} is for a GPU"}
    half = copy.deepcopy(model).to(torch.bfloat16)
    with torch.no_grad():
        exact = model(ids, use_cache=False).logits
        half.set_attn_implementation("eager")
        eager = half(ids, use_cache=False).logits
        half.set_attn_implementation(name)
        found = half(ids, use_cache=False).logits
    errors = {"kernel": off({"logits": found}, {"logits": exact}), "eager": off({"logits": eager}, {"logits": exact})}
    if not errors["kernel"] <= HALF_FACTOR * errors["eager"] + 1e-3:
        raise ValueError(
            f"{name} is {errors['kernel']:.2e} off the float32 logits, eager attention {errors['eager']:.2e}"
        )
    return errors


def check_compiled(sizes: Sizes, ids: torch.Tensor) -> Numbers:
    """Loss and gradients with compiled layers: few of them, for layers that read a cache are compiled one by one."""
    model = build_model(replace(sizes, encoder_layers=1, decoder_layers=2), 0).to(ids.device)
    expected, compiled = fast_step(model, ids), copy.deepcopy(model)
    # A CPU's compiler takes minutes for what a trial asks: does the graph hold?
    compile_blocks(compiled, backend="inductor" if ids.device.type == "cuda" else "aot_eager")
    return assert_equal(fast_step(compiled, ids), expected, tolerance=FLOAT_TOLERANCE)


def check_generation(model: Any, sizes: Sizes, device: torch.device) -> Numbers:
    """Greedy tokens through roll-overs against reading everything anew for each."""
    prompt = random_tokens(sizes, 1, sizes.prompt_length, seed=3).to(device)
    fast = model.generate(prompt, max_new_tokens=sizes.new_tokens, do_sample=False)[0]
    with torch.device(device):
        plain = memory_loop.generate_greedily(model, prompt[0], sizes.new_tokens)
    assert_equal({"tokens": fast}, {"tokens": plain}, tolerance=0.0)
    return {
        "tokens": sizes.new_tokens,
        "roll_overs": (len(fast) - 1) // sizes.window_length - (len(prompt[0]) - 1) // sizes.window_length,
    }


def slot_prompt(model: Any, sizes: Sizes, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a context `(1, 3, L)` and a prompt `(1, T)` with slots in its middle."""
    context = random_tokens(sizes, 1, 3, sizes.chunk_length, seed=4).to(device)
    text = random_tokens(sizes, 1, 8, seed=5).to(device)
    slots = torch.full((1, 3 * sizes.memories_per_chunk), model.config.memory_token_id, device=device)
    return context, torch.cat([text[:, :3], slots, text[:, 3:]], 1)


@torch.no_grad()
def check_slots(model: Any, sizes: Sizes, device: torch.device) -> Numbers:
    """Memories in slots amid a prompt, from a context and ready."""
    context, prompt = slot_prompt(model, sizes, device)
    with torch.device(device):
        plain = {"logits": memory_loop.read_slots(model, list(context[0]), prompt[0])[None]}
    found = assert_equal({"logits": model(prompt, context_input_ids=context).logits}, plain, tolerance=FLOAT_TOLERANCE)
    memories, mask = model.encode_memories(context)
    ready = model(prompt, memory_embeds=memories, memory_mask=mask).logits
    assert_equal({"logits": ready}, plain, tolerance=FLOAT_TOLERANCE)
    return found


@torch.no_grad()
def check_store(model: Any, sizes: Sizes, device: torch.device) -> Numbers:
    """Memories through a store on disk against those of the call itself."""
    tokenizer = train_tokenizer([TEXT * 4], vocab_size=sizes.vocab_size)
    lengths = {name: getattr(sizes, name) for name in ("chunk_length", "window_length", "memories_per_chunk")}
    processor = MemoryProcessor(tokenizer, **lengths)
    inputs = processor(text="<memory>And then", context=TEXT, return_tensors="pt").to(device)
    with tempfile.TemporaryDirectory() as folder:
        store = MemoryStore.open(f"{folder}/store", model, processor, create=True, dtype="float32")
        store.append({"sea": TEXT})
        stored = model(**store.prepare("<memory>And then", "sea")).logits
        store.close()
    return assert_equal({"logits": stored}, {"logits": model(**inputs).logits}, tolerance=FLOAT_TOLERANCE)


@torch.no_grad()
def count_waits(model: Any, sizes: Sizes, device: torch.device) -> Numbers:
    """Count what makes the host wait in cached steps of one token, by operation, and on a GPU by the driver's word."""
    context, prompt = slot_prompt(model, sizes, device)
    cache = model(prompt, context_input_ids=context, use_cache=True).past_key_values
    steps = list(random_tokens(sizes, 4, 1, 1, seed=6).to(device))
    cache = model(steps.pop(), past_key_values=cache, use_cache=True).past_key_values  # whatever is done once is done
    cuda = device.type == "cuda"

    def take_steps() -> None:
        own = cache
        for token in steps:
            own = model(token, past_key_values=own, use_cache=True).past_key_values

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        if cuda:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            waits = looks_of(take_steps)
        finally:
            if cuda:
                torch.cuda.set_sync_debug_mode("default")
    synchronised = [str(one.message)[:200] for one in told if "synchroniz" in str(one.message)]
    if waits or synchronised:
        raise ValueError(f"in {len(steps)} cached steps the host waits: {waits} {synchronised[:3]}")
    return {"steps": len(steps), "operations": 0, "synchronisations": 0 if cuda else "not counted: no GPU"}


def run(job: Job) -> None:
    """Measure part a."""
    device, sizes = job.device, sizes_of(job.toy)
    model = build_model(sizes, 0).to(device)
    ids = random_tokens(sizes, sizes.train_batch, sizes.train_windows * sizes.window_length, seed=2).to(device)
    checks: dict[str, Callable[[], Numbers]] = {
        "fast path against plain loop": partial(check_steps, model, ids),
        "generation through roll-overs": partial(check_generation, model, sizes, device),
        "slots": partial(check_slots, model, sizes, device),
        "store": partial(check_store, model, sizes, device),
        "host waits in cached steps": partial(count_waits, model, sizes, device),
        **{f"attention by {name}": partial(check_kernel, model, ids, name) for name in KERNELS},
        "compiled layers": partial(check_compiled, sizes, ids),  # the slowest, and the one most likely to hang
    }
    for name, check in checks.items():
        job.measure(name, check)
