"""A prompt answered from a memory store: which memories are used, what the model makes of them, what it writes.

```bash
python -m training.ask runs/quickstart/hub runs/letters "<copy>" --texts letters/first.txt
python -m training.ask runs/quickstart/hub runs/letters --nearest 4 --show --regenerate    # asks for prompts
python -m training.ask runs/smollm2/hub runs/letters --question "Who wrote the first letter?"
```

All of a store is used where the model has room for it, else the chunks nearest to the prompt: those of the passages
that share most words with it (BM25) where text was kept, else those with the nearest memories. In reading order they
stand where the prompt has its memory token, or in front of it. Which they are is said on stderr.

L chunk length, K memories per chunk, D decoder width.
"""

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from modeling_memory import Chunk, MemoryQuestionAnswering, MemoryStore, RememberedContexts
from training.command_line import Parser, device, positive_number, run_command, whole_number
from training.remember import load_memory_model

SHOWN = 60
SHOWN_TEXTS = 5
GREETING = "A prompt, and the answer; an empty line ends it."


@dataclass(frozen=True)
class Used:
    """A chunk that a prompt is answered from.

    Attributes:
        chunk ([`Chunk`]): The chunk.
        score (`float`, *optional*): How near it is to the prompt; `None` if that was not asked for.
        by (`str`): What the score is: `"BM25"` of its passage, or `"cosine"` of its memories.
        in_clear (`bool`): Whether it stands in the prompt as text.
    """

    chunk: Chunk
    score: float | None = None
    by: str = "cosine"
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
        expand (`int`): How many of the chunks, the nearest ones, stand as full text.

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
    by, scores = rank(store, prompt, max(wanted, expand), texts)
    best = list(scores)
    kept = set(chunks) if nearest is None and wanted == len(chunks) else set(best[:wanted])
    in_clear = set(best[:expand])
    return [Used(chunk, scores.get(chunk), by, chunk in in_clear) for chunk in chunks if chunk in kept]


def rank(
    store: MemoryStore, prompt: str, number: int, texts: Sequence[str] | None = None
) -> tuple[str, dict[Chunk, float]]:
    """Find the chunks that are nearest to a prompt: by its words if text is kept and shares one, else by memories.

    Returns:
        `"BM25"` or `"cosine"`, and chunks with their scores, nearest first; of a passage those that share more words.
    """
    question = without_markers(store, prompt)
    scores: dict[Chunk, float] = {}
    if store.keeps_text:
        words = set(re.findall(r"\w+", question.casefold()))
        for passage, score in store.search_text(question, number, text_ids=texts):
            parts = dict(zip(passage.chunks, store.expand(passage.chunks), strict=True))
            shared = {one: len(words & set(re.findall(r"\w+", parts[one].casefold()))) for one in parts}
            scores |= dict.fromkeys(sorted(parts, key=lambda one: -shared[one]), score)
            if len(scores) >= number:
                break
        if scores:
            return "BM25", scores
    for found in store.nearest(prompt_memories(store, question), number, text_ids=texts):
        for chunk, cosine in found:
            scores[chunk] = max(cosine, scores.get(chunk, -1.0))
    return "cosine", dict(sorted(scores.items(), key=lambda pair: -pair[1]))


def without_markers(store: MemoryStore, prompt: str) -> str:
    """Return a prompt without special tokens, to search by.

    Raises:
        ValueError: If nothing is left.
    """
    for token in sorted(store.processor.tokenizer.all_special_tokens, key=len, reverse=True):
        prompt = prompt.replace(token, "")
    if not prompt.strip():
        raise ValueError(
            "The prompt has no words to find memories by, and the store holds more than the model has room for. Name "
            "texts with --texts, or write what to look for."
        )
    return prompt


def prompt_memories(store: MemoryStore, prompt: str) -> torch.Tensor:
    """Return memories `(Q, D)` of a prompt's own chunks, to search by."""
    processor = store.processor
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


def answer(store: MemoryStore, prompt: str, used: Sequence[Used], is_question: bool = False, **options: Any) -> str:
    """Write what follows a prompt, or answer a question.

    Args:
        store ([`MemoryStore`]): Opened with its model.
        prompt (`str`): The prompt.
        used (`Sequence` of [`Used`]): From [`choose`].
        is_question (`bool`): Whether the prompt is a question for the decoder's chat template.
        options: Of `generate`.

    Raises:
        ValueError: If a question is asked with chunks as text, or the decoder has no chat template.
    """
    in_clear = [one.chunk for one in used if one.in_clear]
    if is_question:
        if in_clear:
            raise ValueError("--question answers from memories alone; leave --expand out")
        embeds = store.load([one.chunk for one in used])["memory_embeds"]
        model: Any = store.model
        pipeline = MemoryQuestionAnswering(model=model, processor=store.processor, device=model.device)
        reply: Any = pipeline(context=RememberedContexts(embeds, [embeds.shape[1]]), question=prompt, **options)
        return reply["answer"]
    inputs = store.prepare(prompt, [one.chunk for one in used], expand=in_clear)
    output = store.model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]  # type: ignore[union-attr]
    return store.processor.decode(output, skip_special_tokens=True)


def used_lines(store: MemoryStore, used: Sequence[Used], regenerated: Sequence[str] | None = None) -> list[str]:
    """Say which memories a prompt is answered from, a line each, and below what the model makes of each alone."""
    lines = []
    for place, one in enumerate(used):
        chunk = one.chunk
        where = "" if chunk.start is None else f", characters {chunk.start} to {chunk.end}"
        near = "" if one.score is None else f", {one.by} {one.score:.3f}"
        text = f": {_short(store.expand(chunk)[0])}" if store.keeps_text and chunk.start is not None else ""
        kind = "full text" if one.in_clear else "memory"
        lines.append(f"{kind} {place}: {chunk.text_id}, chunk {chunk.number}{where}{near}{text}")
        if regenerated is not None:
            lines.append(f"  regenerated: {_short(regenerated[place])}")
    return lines


def summary(used: Sequence[Used]) -> str:
    """Say in a line which texts a prompt is answered from, as how many memories, and how much of it as text."""
    numbers: dict[str, list[int]] = {}
    for one in used:
        numbers.setdefault(one.chunk.text_id, []).append(one.chunk.number)
    named = [f"{text_id} ({len(own)} chunks from {own[0]})" for text_id, own in list(numbers.items())[:SHOWN_TEXTS]]
    more = f" and {len(numbers) - SHOWN_TEXTS} more texts" if len(numbers) > SHOWN_TEXTS else ""
    in_clear = sum(one.in_clear for one in used)
    return f"answered from {', '.join(named)}{more}: {len(used) - in_clear} as memories, {in_clear} as text"


def _short(text: str) -> str:
    shown = repr(text)
    return shown if len(shown) <= SHOWN else f"{shown[: SHOWN - 4]}...{shown[0]}"


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = Parser(prog="python -m training.ask", description="Answer prompts from a memory store.")
    add = parser.add_argument
    add("model", help="folder or Hub id of the model that remembered")
    add("store", help="folder of the store, from python -m training.remember")
    add("prompt", nargs="?", help="prompt; without one, prompts are asked for")
    add("--texts", nargs="+", metavar="ID", help="answer from these texts only")
    add("--nearest", type=whole_number(), metavar="N", help="answer from so many chunks, the nearest to the prompt")
    add(
        "--expand",
        type=whole_number(0),
        default=0,
        metavar="N",
        help="put the N nearest chunks into the prompt as text",
    )
    add("--question", action="store_true", help="ask the prompt as a question in the decoder's chat template")
    add("--show", action="store_true", help="show which memories are used")
    add("--regenerate", action="store_true", help="show what the model regenerates from each memory alone")
    add("--max-new-tokens", type=whole_number(), default=32, metavar="N", help="tokens of the answer (32)")
    add("--temperature", type=positive_number, metavar="X", help="sample at this temperature; greedy without")
    add("--top-p", type=positive_number, default=1.0, metavar="X", help="sample from this much of the probability (1)")
    add("--seed", type=whole_number(0), default=0, metavar="N", help="of sampling (0)")
    add("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu", help="where the model runs")
    add("--threads", type=whole_number(), metavar="N", help="processor threads")
    return parser


def run(options: argparse.Namespace, command: str, ask: Callable[[str], str] = input) -> None:
    """Do what the command line says."""
    model, processor = load_memory_model(options.model, options.device)
    store = MemoryStore(options.store, model, processor)
    writing: dict[str, Any] = {"max_new_tokens": options.max_new_tokens, "do_sample": options.temperature is not None}
    if options.temperature is not None:
        writing |= {"temperature": options.temperature, "top_p": options.top_p}
        transformers.set_seed(options.seed)

    def reply(prompt: str) -> None:
        used = choose(store, prompt, options.texts, options.nearest, options.expand)
        print(summary(used), file=sys.stderr)
        if any(one.score is not None and one.by == "cosine" for one in used):
            note = "found by memories, which compare how text begins, not what it means"
            note += "" if store.keeps_text else "; `remember --keep-text` lets a store be searched by words"
            print(note, file=sys.stderr)
        if options.show or options.regenerate:
            regenerated = regenerate(store, [one.chunk for one in used]) if options.regenerate else None
            print("\n".join(used_lines(store, used, regenerated)))
        print(answer(store, prompt, used, options.question, **writing), flush=True)

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
    return run_command(build_parser(), run, arguments)


if __name__ == "__main__":
    sys.exit(main())
