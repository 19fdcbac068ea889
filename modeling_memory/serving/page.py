"""A page to try a memory model: a document becomes memories; quote it, ask it, and see what was lost.

```python
page(model, processor).launch()  # all that a Space's app.py needs, beside loading the two
```

n chunks, K memories per chunk, D decoder width.
"""

import html
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import gradio as gr

from ..pipeline_memory import RememberedContexts
from ..store import MemoryStore
from .asking import choose
from .engine import Engine, Limits, RefusedError

SHOWN_NUMBERS = 32
EXAMPLE = "The sign was newly painted; the windows had neat red curtains; the floor was cleanly sanded."
TITLE = """# A text as a few vectors
A document becomes a memory for each of its chunks. The model writes from these vectors alone; it never sees the text
again."""
PROMPT, QUESTION = "a text to go on with", "a question"
Session = dict[str, Any]


def remember(engine: Engine, text: str, before: Session | None) -> Session:
    """Keep a document in a store of its own, which the session's end removes."""
    if not text.strip():
        raise ValueError("There is no text. Paste a document, or upload one.")
    with engine.tokenizer_lock:
        num_tokens = sum(engine.processor.cut_context(text).num_tokens)
    if num_tokens > engine.limits.context_tokens:
        raise ValueError(f"The document has {num_tokens} tokens; this page takes {engine.limits.context_tokens}.")
    forget(before)
    folder = Path(tempfile.mkdtemp(prefix="modeling-memory-"))
    store = MemoryStore.open(folder / "store", engine.model, engine.processor, create=True, keep_text=True)
    with engine.model_lock, engine.tokenizer_lock:
        store.append({"document": text})
    return {"folder": folder, "store": store, "text": text}


def forget(session: Session | None) -> None:
    """Remove what a session kept: memories are as sensitive as their text."""
    if session:
        session["store"].close()
        shutil.rmtree(session["folder"], ignore_errors=True)


def chunk_table(store: MemoryStore) -> str:
    """Show the chunks of a document, each with the numbers that its memory begins with, from blue to red."""
    chunks = store.chunks()
    lines = []
    for chunk, text, memory in zip(chunks, store.expand(chunks), store.memories(chunks), strict=True):
        numbers = memory.flatten()[:SHOWN_NUMBERS]
        scaled = (numbers / memory.abs().max().clamp(min=1e-6)).tolist()
        cells = "".join(
            f'<i style="display:inline-block;width:6px;height:14px;background:hsl({0 if one > 0 else 220} 80% '
            f'{95 - 50 * abs(one):.0f}%)"></i>'
            for one in scaled
        )
        lines.append(
            f"<tr><td>{chunk.number}</td><td>{html.escape(text)}</td><td>{chunk.num_tokens}</td><td>{cells}</td></tr>"
        )
    head = f"<tr><th>chunk</th><th>text</th><th>tokens</th><th>memory, first {SHOWN_NUMBERS} numbers</th></tr>"
    return f'<table id="chunks">{head}{"".join(lines)}</table>'


def costs(engine: Engine, store: MemoryStore, text: str) -> str:
    """Say what memories cost and save beside the full text."""
    config = engine.model.config.decoder
    # Any decoder of the library names these three; keys and values of a layer, in the dtype of the weights.
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_position = 2 * config.num_hidden_layers * heads * width * engine.model.dtype.itemsize
    with engine.tokenizer_lock:
        num_text = len(engine.processor.text_ids(text))
    num_memories = store.num_chunks * engine.processor.memories_per_chunk
    vectors = store.num_chunks * store.chunk_bytes
    return "\n".join(
        [
            "| | full text | memories |",
            "|---|---:|---:|",
            f"| positions that the decoder reads | {num_text:,} | {num_memories:,} |",
            f"| bytes of its cache for them | {num_text * per_position:,} | {num_memories * per_position:,} |",
            f"| bytes on disk | {len(text.encode()):,} | {vectors:,} |",
            "",
            f"{num_text - num_memories:,} positions saved, {1 - num_memories / num_text:.0%}; on disk memories take "
            f"{vectors / len(text.encode()):.1f} times their text.",
        ]
    )


def write_back(engine: Engine, session: Session) -> tuple[str, str]:
    """Let the model write the document from its memories alone, with wrong tokens marked; and say what was lost."""
    store, decode = session["store"], engine.processor.tokenizer.decode
    with engine.model_lock:
        written = store.regenerate_ids(store.chunks())
    with engine.tokenizer_lock:
        cut = engine.processor.cut_context(session["text"])
    pairs = [pair for own, given in zip(cut.chunks, written, strict=True) for pair in zip(own, given, strict=True)]
    marks = []
    # Runs of right and of wrong tokens: a character may be made of several tokens, which mean nothing alone, nor need
    # they be of one chunk.
    for is_right, run in groupby(pairs, lambda pair: pair[0] == pair[1]):
        true, back = (html.escape(decode(list(ids))) for ids in zip(*run, strict=True))
        marks.append(back if is_right else f'<mark title="{true}">{back}</mark>')
    lost = [
        f"- chunk {number}: `{decode(own)}` came back as `{decode(given)}`"
        for number, (own, given) in enumerate(zip(cut.chunks, written, strict=True))
        if own != given
    ]
    right, total = sum(true == token for true, token in pairs), len(pairs)
    told = f"**{right} of {total} tokens came back ({right / total:.1%})**, written in one pass, no text in sight."
    if lost:
        told += f" {len(lost)} of {len(written)} chunks lost something:\n\n" + "\n".join(lost)
    else:
        told += " Nothing was lost."
    return f'<div id="written" style="white-space:pre-wrap">{"".join(marks)}</div>', told


def answer(engine: Engine, session: Session, prompt: str, is_question: bool) -> Iterator[tuple[str, str]]:
    """Write what follows a prompt, or answer a question in the decoder's chat template, piece by piece."""
    store = session["store"]
    with engine.model_lock, engine.tokenizer_lock:
        used = choose(store, prompt)
    loaded = store.load([one.chunk for one in used])
    embeds = loaded["memory_embeds"]
    memories = RememberedContexts(embeds, [embeds.shape[1]], loaded.get("memory_num_tokens"))
    told = f"Read from {len(used)} of {store.num_chunks} chunks"
    told += "." if len(used) == store.num_chunks else ": " + ", ".join(str(one.chunk.number) for one in used) + "."
    engine.enter()
    text: Any = [{"role": "user", "content": prompt}] if is_question else prompt
    written = ""
    writing = engine.write(text, memories, max_new_tokens=min(256, engine.limits.new_tokens))
    try:
        for piece in writing:
            written += piece
            yield written, told
    finally:
        writing.stop()
    yield written, told


def page(model: Any, processor: Any, limits: Limits | None = None) -> gr.Blocks:
    """Build the page.

    Args:
        model ([`MemoryEncoderDecoderForCausalLM`]): In `eval()` mode.
        processor ([`MemoryProcessor`]): Its processor.
        limits ([`Limits`], *optional*): What visitors may ask for.
    """
    engine = Engine(model, processor, limits=limits)
    copies = model.config.copy_token_id is not None

    def on_remember(text: str, session: Session | None) -> tuple[Any, ...]:
        with _told():
            session = remember(engine, text, session)
        store = session["store"]
        return session, costs(engine, store, text), chunk_table(store), "", ""

    def on_write_back(session: Session | None) -> tuple[str, str]:
        with _told():
            return write_back(engine, _remembered(session))

    def on_answer(session: Session | None, prompt: str, kind: str) -> Iterator[tuple[str, str]]:
        with _told():
            yield from answer(engine, _remembered(session), prompt, kind == QUESTION)

    def on_quote(session: Session | None) -> Iterator[tuple[str, str]]:
        token = processor.tokenizer.convert_ids_to_tokens(model.config.copy_token_id)
        yield from on_answer(session, token, PROMPT)

    with gr.Blocks(title="modeling-memory", analytics_enabled=False) as blocks:
        gr.Markdown(TITLE)
        session = gr.State(None, time_to_live=3600, delete_callback=forget)
        document = gr.Textbox(EXAMPLE, label="Document", lines=6, elem_id="document")
        with gr.Row():
            file = gr.UploadButton("Upload a text file", file_types=[".txt", ".md"])
            kept = gr.Button("Remember", variant="primary", elem_id="remember")
        cost = gr.Markdown(elem_id="costs")
        with gr.Accordion("Chunks and memories", open=True):
            chunks = gr.HTML()
        back = gr.Button("Write it back from the memories", elem_id="back")
        written, lost = gr.HTML(), gr.Markdown(elem_id="lost")
        with gr.Row():
            prompt = gr.Textbox(label="Prompt", elem_id="prompt")
            kind = gr.Radio([PROMPT, QUESTION], value=PROMPT, label="read as")
        with gr.Row():
            asked = gr.Button("Ask", elem_id="ask")
            quoted = gr.Button("Quote", elem_id="quote", visible=copies)
        reply, used = gr.Textbox(label="Answer", elem_id="answer"), gr.Markdown(elem_id="used")
        file.upload(lambda name: Path(name).read_text("utf-8", errors="replace"), file, document, api_name="upload")
        kept.click(on_remember, [document, session], [session, cost, chunks, written, lost], api_name="remember")
        back.click(on_write_back, session, [written, lost], api_name="write_back")
        asked.click(on_answer, [session, prompt, kind], [reply, used], api_name="ask")
        quoted.click(on_quote, session, [reply, used], api_name="quote")
    return blocks


def _remembered(session: Session | None) -> Session:
    if session is None:
        raise ValueError("Nothing is remembered yet. Press Remember first.")
    return session


@contextmanager
def _told() -> Iterator[None]:
    """Show a mistake of the visitor as a message, and a fault as a fault."""
    try:
        yield
    except (ValueError, RefusedError) as error:
        raise gr.Error(str(error), print_exception=False) from error
