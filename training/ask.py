"""A prompt answered from a memory store: which memories are used, what the model makes of them, what it writes.

```bash
python -m training.ask runs/quickstart/hub runs/letters "<copy>" --texts letters/first.txt
python -m training.ask runs/quickstart/hub runs/letters --nearest 4 --show --regenerate    # asks for prompts
python -m training.ask runs/smollm2/hub runs/letters --question "Who wrote the first letter?"
```

All of a store is used where the model has room for it, else the chunks nearest to the prompt: those of the passages
that share most words with it (BM25; with a sentence encoder both orders are fused) where text was kept, else those
with the nearest memories. In reading order they
stand where the prompt has its memory token, or in front of it. Which they are is said on stderr.

L chunk length, K memories per chunk, D decoder width.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
import transformers

from modeling_memory import MemoryQuestionAnswering, MemoryStore, RememberedContexts
from modeling_memory.serving.asking import Used, choose

from .command_line import Parser, device, positive_number, run_command, whole_number
from .measure.sentences import SentenceEncoder
from .places import program
from .remember import load_memory_model

SHOWN = 60
SHOWN_TEXTS = 5
GREETING = "A prompt, and the answer; an empty line ends it."


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
    parser = Parser(prog=program("ask"), description="Answer prompts from a memory store.")
    add = parser.add_argument
    add("model", help="folder or Hub id of the model that remembered")
    add("store", help="folder of the store, from `remember`")
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
    add(
        "--sentence-encoder",
        metavar="NAME",
        help="folder, Hub id or package:MODULE/FOLDER of an encoder that helps to find passages",
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


def run(options: argparse.Namespace, command: str, ask: Callable[[str], str] = input) -> dict[str, Any] | None:
    """Do what the command line says; returns what was answered if one prompt was given."""
    if options.prompt is None and getattr(options, "json", False):
        raise ValueError("--json prints one answer; give the prompt on the command line")
    model, processor = load_memory_model(options.model, options.device)
    store = MemoryStore(options.store, model, processor)
    writing: dict[str, Any] = {"max_new_tokens": options.max_new_tokens, "do_sample": options.temperature is not None}
    if options.temperature is not None:
        writing |= {"temperature": options.temperature, "top_p": options.top_p}
        transformers.set_seed(options.seed)

    embed = SentenceEncoder(options.sentence_encoder, options.device) if options.sentence_encoder else None

    def reply(prompt: str) -> dict[str, Any]:
        used = choose(store, prompt, options.texts, options.nearest, options.expand, embed)
        print(summary(used), file=sys.stderr)
        if any(one.score is not None and one.by == "cosine" for one in used):
            note = "found by memories, which compare how text begins, not what it means"
            note += "" if store.keeps_text else "; `remember --keep-text` lets a store be searched by words"
            print(note, file=sys.stderr)
        regenerated = store.regenerate([one.chunk for one in used]) if options.regenerate else None
        if options.show or options.regenerate:
            print("\n".join(used_lines(store, used, regenerated)))
        written = answer(store, prompt, used, options.question, **writing)
        print(written, flush=True)
        texts: Sequence[str | None] = regenerated or [None] * len(used)
        told = [{**asdict(one), "regenerated": text} for one, text in zip(used, texts, strict=True)]
        return {"prompt": prompt, "answer": written, "used": told}

    if options.prompt is not None:
        return reply(options.prompt)
    print(f"{len(store)} texts, {store.num_chunks:,} chunks. {GREETING}")
    while True:
        try:
            prompt = ask("> ")
        except EOFError:
            return None
        if not prompt.strip():
            return None
        try:
            reply(prompt)
        except ValueError as error:
            print(f"error: {error}")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return run_command(build_parser(), run, arguments)


if __name__ == "__main__":
    sys.exit(main())
