"""A prompt answered from a memory store: which memories are used, what the model makes of them, what it writes.

```bash
python -m training.ask runs/quickstart/hub runs/letters "<copy>" --texts letters/first.txt
python -m training.ask runs/quickstart/hub runs/letters --nearest 4 --show --regenerate    # asks for prompts
```

All of a store is used where the model has room for it, else the chunks nearest to the prompt. In reading order they
stand where the prompt has its memory token, or in front of it.

L chunk length, K memories per chunk, D decoder width.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from modeling_memory import Chunk, MemoryStore
from training.remember import load_memory_model

SHOWN = 60
GREETING = "A prompt, and the answer; an empty line ends it."


@dataclass(frozen=True)
class Used:
    """A chunk that a prompt is answered from.

    Attributes:
        chunk ([`Chunk`]): The chunk.
        cosine (`float`, *optional*): How near it is to the prompt; `None` if that was not asked for.
        in_clear (`bool`): Whether it stands in the prompt as text.
    """

    chunk: Chunk
    cosine: float | None = None
    in_clear: bool = False


def choose(
    store: MemoryStore, prompt: str, texts: Sequence[str] | None = None, nearest: int | None = None, expand: int = 0
) -> list[Used]:
    """Choose the chunks that a prompt is answered from, in reading order.

    Args:
        store ([`MemoryStore`]): Opened with its model.
        prompt (`str`): The prompt.
        texts (`Sequence` of `str`, *optional*): Ids of texts to choose from. Default: all.
        nearest (`int`, *optional*): Only so many chunks, the nearest to the prompt. Default: all if the model has room
            for them, else as many as it has room for.
        expand (`int`): How many of the chunks, the nearest ones, stand in clear text.

    Raises:
        ValueError: If there is no such text, nothing to choose from, or no token in the prompt to compare by.
    """
    chunks = store.chunks(texts)
    if not chunks:
        raise ValueError(f"{store.folder} holds no memories. Fill it with python -m training.remember.")
    per_chunk, capacity = store.processor.memories_per_chunk, store.model.config.memory_capacity  # type: ignore[union-attr]
    room = len(chunks) if capacity is None else max(capacity // per_chunk, 1)
    wanted = min(room if nearest is None else nearest, len(chunks))
    if wanted == len(chunks) and nearest is None and not expand:
        return [Used(chunk) for chunk in chunks]
    queries = prompt_memories(store, prompt)
    cosines: dict[Chunk, float] = {}
    for found in store.nearest(queries, max(wanted, expand), text_ids=texts):
        for chunk, cosine in found:
            cosines[chunk] = max(cosine, cosines.get(chunk, -1.0))
    best = sorted(cosines, key=lambda chunk: -cosines[chunk])
    kept = set(chunks) if nearest is None and wanted == len(chunks) else set(best[:wanted])
    in_clear = set(best[:expand])
    return [Used(chunk, cosines.get(chunk), chunk in in_clear) for chunk in chunks if chunk in kept]


def prompt_memories(store: MemoryStore, prompt: str) -> torch.Tensor:
    """Return memories `(Q, D)` of a prompt's own chunks, special tokens left out, to search by."""
    processor = store.processor
    for token in sorted(processor.tokenizer.all_special_tokens, key=len, reverse=True):
        prompt = prompt.replace(token, "")
    if not prompt.strip():
        raise ValueError(
            "The prompt has no words to find memories by, and the store holds more than the model has room for. Name "
            "texts with --texts, or write what to look for."
        )
    inputs = processor(context=prompt, return_tensors="pt").to(store.model.device)  # type: ignore[union-attr]
    with torch.no_grad():
        memories, mask = store.model.encode_memories(  # type: ignore[union-attr]
            inputs["context_input_ids"], inputs["context_attention_mask"]
        )
    return memories[mask.bool()].float().cpu()


@torch.no_grad()
def regenerate(store: MemoryStore, chunks: Sequence[Chunk]) -> list[str]:
    """Let the model write chunks from their memories alone, without any text in sight: one pass, all chunks at once.

    Chunks that follow each other and fill a window together are written together, as in training.

    Args:
        store ([`MemoryStore`]): Opened with its model.
        chunks (`Sequence` of [`Chunk`]): The chunks.

    Raises:
        ValueError: If the model knows no BLANK token, by which it is asked to.
    """
    model: Any = store.model
    processor, config = store.processor, model.config
    if config.blank_token_id is None:
        raise ValueError("The model knows no BLANK token, so it cannot be asked what a memory holds.")
    if processor.encoder_tokenizer is not None:
        raise ValueError("Encoder and decoder cut text differently, so chunks cannot be laid beside what is written.")
    per_window = config.window_length // config.chunk_length
    groups: list[list[Chunk]] = []
    for chunk in chunks:
        last = groups[-1] if groups else []
        if (
            last
            and last[-1].text_id == chunk.text_id
            and last[-1].number == chunk.number - 1
            and len(last) < per_window
        ):
            last.append(chunk)
        else:
            groups.append([chunk])
    written = []
    slots = [config.memory_token_id] * config.memories_per_chunk
    for size in sorted({len(group) for group in groups}):
        rows = [group for group in groups if len(group) == size]
        row = slots * size + [config.blank_token_id] * (config.chunk_length * size)
        memories = store.load([chunk for group in rows for chunk in group])["memory_embeds"]
        memories = memories.reshape(len(rows), -1, memories.shape[-1])  # (groups, size*K, D)
        input_ids = torch.tensor([row] * len(rows), device=model.device)
        logits = model(input_ids=input_ids, memory_embeds=memories, use_cache=False).logits
        tokens = logits[:, len(slots) * size :].argmax(-1).reshape(len(rows), size, config.chunk_length).tolist()
        for group, lines in zip(rows, tokens, strict=True):
            for chunk, line in zip(group, lines, strict=True):
                written.append((chunk, processor.tokenizer.decode(line[: chunk.num_tokens])))
    by_chunk = dict(written)
    return [by_chunk[chunk] for chunk in chunks]


def answer(store: MemoryStore, prompt: str, used: Sequence[Used], **options: Any) -> str:
    """Write what follows a prompt.

    Args:
        store ([`MemoryStore`]): Opened with its model.
        prompt (`str`): The prompt.
        used (`Sequence` of [`Used`]): From [`choose`].
        options: Of `generate`.
    """
    in_clear = [one.chunk for one in used if one.in_clear]
    inputs = store.prepare(prompt, [one.chunk for one in used], expand=in_clear)
    output = store.model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]  # type: ignore[union-attr]
    return store.processor.decode(output, skip_special_tokens=True)


def used_lines(store: MemoryStore, used: Sequence[Used], regenerated: Sequence[str] | None = None) -> list[str]:
    """Say which memories a prompt is answered from, a line each, and below what the model makes of each alone."""
    lines = []
    for place, one in enumerate(used):
        chunk = one.chunk
        where = "" if chunk.start is None else f", characters {chunk.start} to {chunk.end}"
        near = "" if one.cosine is None else f", cosine {one.cosine:.3f}"
        text = f": {_short(store.expand(chunk)[0])}" if store.keeps_text and chunk.start is not None else ""
        kind = "in clear" if one.in_clear else "memory"
        lines.append(f"{kind} {place}: {chunk.text_id}, chunk {chunk.number}{where}{near}{text}")
        if regenerated is not None:
            lines.append(f"  regenerated: {_short(regenerated[place])}")
    return lines


def _short(text: str) -> str:
    shown = repr(text)
    return shown if len(shown) <= SHOWN else f"{shown[: SHOWN - 4]}...{shown[0]}"


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = argparse.ArgumentParser(prog="python -m training.ask", description="Answer prompts from a memory store.")
    add = parser.add_argument
    add("model", help="folder or Hub id of the model that remembered")
    add("store", help="folder of the store, from python -m training.remember")
    add("prompt", nargs="?", help="prompt; without one, prompts are asked for")
    add("--texts", nargs="+", metavar="ID", help="answer from these texts only")
    add("--nearest", type=int, metavar="N", help="answer from so many chunks, the nearest to the prompt")
    add("--expand", type=int, default=0, metavar="N", help="put the N nearest chunks into the prompt as text")
    add("--show", action="store_true", help="show which memories are used")
    add("--regenerate", action="store_true", help="show what the model regenerates from each memory alone")
    add("--max-new-tokens", type=int, default=32, metavar="N", help="tokens of the answer (32)")
    add("--temperature", type=float, metavar="X", help="sample at this temperature; greedy without")
    add("--top-p", type=float, default=1.0, metavar="X", help="sample from this much of the probability (1)")
    add("--seed", type=int, default=0, metavar="N", help="of sampling (0)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where the model runs")
    add("--threads", type=int, metavar="N", help="processor threads")
    return parser


def run(options: argparse.Namespace, ask: Callable[[str], str] = input) -> None:
    """Do what the command line says."""
    if options.threads:
        torch.set_num_threads(options.threads)
    for name in ("nearest", "max_new_tokens"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(options, name)}; expected 1 or more")
    model, processor = load_memory_model(options.model, options.device)
    store = MemoryStore(options.store, model, processor)
    writing: dict[str, Any] = {"max_new_tokens": options.max_new_tokens, "do_sample": options.temperature is not None}
    if options.temperature is not None:
        writing |= {"temperature": options.temperature, "top_p": options.top_p}
        transformers.set_seed(options.seed)

    def reply(prompt: str) -> None:
        used = choose(store, prompt, options.texts, options.nearest, options.expand)
        if options.show or options.regenerate:
            regenerated = regenerate(store, [one.chunk for one in used]) if options.regenerate else None
            print("\n".join(used_lines(store, used, regenerated)))
        print(answer(store, prompt, used, **writing), flush=True)

    if options.prompt is not None:
        reply(options.prompt)
        return
    print(f"{len(store)} texts, {store.num_chunks:,} chunks. {GREETING}")
    while True:
        try:
            prompt = ask("> ")
        except EOFError:
            return
        if not prompt.strip():
            return
        try:
            reply(prompt)
        except ValueError as error:
            print(f"error: {error}")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = build_parser().parse_args(arguments)
    transformers.utils.logging.disable_progress_bar()
    try:
        run(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
