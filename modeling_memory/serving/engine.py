"""One model that answers many requests: contexts are encoded once and kept, answers are written one after the other.

A request gets memories of its own contexts and of the texts that it names, a cache of its own, and nothing else.

M memories of a request, D decoder width.
"""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import transformers
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from ..pipeline_memory import BETWEEN, RememberedContexts
from ..store import MemoryStore
from .asking import choose

PLAIN_CHAT = "{{ messages | map(attribute='content') | join('\\n') }}"
"""For decoders that learnt no chats: what was said, line by line. Memories stand in front."""


class RefusedError(Exception):
    """A request that is not answered.

    Attributes:
        status (`int`): Of HTTP: 400 for what is wrong, 404 for what is not there, 413 for what is too long, 429 for
            too much at a time.
        code (`str`): What it is, for programs.
    """

    def __init__(self, status: int, message: str, code: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


@dataclass(frozen=True)
class Limits:
    """What requests may ask for.

    Attributes:
        body_bytes (`int`): Bytes of a request.
        context_tokens (`int`): Tokens of all its contexts.
        new_tokens (`int`): Tokens of an answer.
        requests (`int`): Requests at a time: one is being answered, the others wait.
        cache_bytes (`int`): Bytes of contexts' memories that are kept.
    """

    body_bytes: int = 4 << 20
    context_tokens: int = 131_072
    new_tokens: int = 1024
    requests: int = 8
    cache_bytes: int = 256 << 20


class Writing:
    """An answer while it is written: iterate over its pieces, once; then `num_tokens` and `finish_reason` are known.

    Args:
        prompt (`dict`): What `generate` takes.
        options (`dict`): Of `generate`.
        stops (`Sequence[str]`): Where the answer ends, which is no part of it.
    """

    def __init__(self, prompt: dict[str, Any], options: dict[str, Any], stops: Sequence[str] = ()) -> None:
        self.prompt, self.options, self.stops = prompt, options, stops
        self.num_prompt_tokens = prompt["input_ids"].shape[1]
        self.num_memories = prompt["memory_embeds"].shape[1] if "memory_embeds" in prompt else 0
        self.num_tokens, self.finish_reason = 0, "length"
        self.is_stopped = False
        self._failed: list[BaseException] = []
        self._pieces: Iterator[str] = iter(())

    def stop(self) -> None:
        """End with the next token, whoever reads."""
        self.is_stopped = True

    def start(self, engine: "Engine", seed: int | None) -> None:
        """Write in a thread of its own, which gives the place in the engine back when it ends."""
        streamer = TextIteratorStreamer(engine.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        criteria = StoppingCriteriaList([_Watch(self)])

        def write() -> None:
            try:
                with engine.model_lock:
                    if seed is not None:
                        transformers.set_seed(seed)
                    written = engine.model.generate(
                        **self.prompt, **self.options, streamer=streamer, stopping_criteria=criteria
                    )
                if int(written[0, -1]) in engine.end_ids:
                    self.finish_reason = "stop"
            except BaseException as error:  # it belongs to whoever reads, who would wait for ever
                self._failed.append(error)
                streamer.end()
            finally:
                engine.leave()

        self._pieces = iter(streamer)
        self._thread = threading.Thread(target=write, daemon=True)
        self._thread.start()
        # The first piece is awaited here, so that a prompt that does not fit is refused before anything is sent.
        first = next(self._pieces, "")
        self._raise()
        self._pieces = chain([first], self._pieces)

    def _raise(self) -> None:
        if self._failed:
            raise self._failed[0]

    def __iter__(self) -> Iterator[str]:
        yield from self._until_stop()
        self._thread.join()  # the text ends before the call that writes it, which says why
        self._raise()

    def _until_stop(self) -> Iterator[str]:
        held, keep = "", max(map(len, self.stops), default=1) - 1
        for piece in self._pieces:
            held += piece
            found = min((place for place in map(held.find, self.stops) if place >= 0), default=None)
            if found is not None:
                self.stop()
                self.finish_reason = "stop"
                yield held[:found]
                return
            ready = held[: len(held) - keep]  # the rest may be the beginning of a stop
            held = held[len(ready) :]
            if ready:
                yield ready
        if held:
            yield held


class _Watch(StoppingCriteria):
    """Counts the tokens of an answer, and ends it when nobody wants more."""

    def __init__(self, writing: Writing) -> None:
        self.writing = writing

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.writing.num_tokens += 1
        return torch.full((len(input_ids),), self.writing.is_stopped, device=input_ids.device)


class Engine:
    """A model, its processor and perhaps a store, for many requests.

    Args:
        model ([`MemoryEncoderDecoderForCausalLM`]): In `eval()` mode.
        processor ([`MemoryProcessor`]): Its processor.
        store ([`MemoryStore`], *optional*): Opened with both; requests may name its texts.
        limits ([`Limits`]): What requests may ask for.
    """

    def __init__(
        self, model: Any, processor: Any, store: MemoryStore | None = None, limits: Limits | None = None
    ) -> None:
        self.model, self.processor, self.store = model, processor, store
        self.limits = limits = limits or Limits()
        self.model_lock = threading.RLock()  # adapters are switched inside a call, so calls take turns
        # A tokenizer is told for each text whether control tokens in it are text: two at once would tell each other.
        # Where both locks are held, the model's was taken first.
        self.tokenizer_lock = threading.RLock()
        self._places = threading.BoundedSemaphore(limits.requests)
        self._kept: OrderedDict[str, RememberedContexts] = OrderedDict()
        self._kept_bytes = 0
        ends = model.generation_config.eos_token_id
        self.end_ids = set(ends) if isinstance(ends, list) else {ends}

    def enter(self) -> None:
        """Take a place among the requests; whoever enters must [`leave`].

        Raises:
            RefusedError: If there is none.
        """
        if not self._places.acquire(blocking=False):
            message = f"{self.limits.requests} requests are being answered or wait; try again in a moment."
            raise RefusedError(429, message, "too_many_requests")

    def leave(self) -> None:
        """Give the place back."""
        self._places.release()

    def remember(self, text: str) -> RememberedContexts:
        """Return the memories of a context; one that was given before is not encoded again."""
        # The whole digest: another text of the same key would be another request's context in the answer.
        key = hashlib.sha256(text.encode()).hexdigest()
        with self.model_lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
            with self.tokenizer_lock:
                inputs = self.processor(context=[[text]], return_tensors="pt").to(self.model.device)
            with torch.no_grad():
                embeds, _, num_tokens = self.model.encode_memories(
                    inputs["context_input_ids"], inputs["context_attention_mask"], return_num_tokens=True
                )
            found = RememberedContexts(embeds, [embeds.shape[1]], num_tokens)
            self._kept[key] = found
            self._kept_bytes += embeds.nbytes
            while self._kept_bytes > self.limits.cache_bytes:
                self._kept_bytes -= self._kept.popitem(last=False)[1].memory_embeds.nbytes
            return found

    def memories(
        self,
        contexts: Sequence[str] = (),
        text_ids: Sequence[str] = (),
        search: str | None = None,
        nearest: int | None = None,
    ) -> RememberedContexts | None:
        """Gather the memories of a request: its contexts, then what it names or looks for in the store.

        Args:
            contexts (`Sequence[str]`): Texts.
            text_ids (`Sequence[str]`): Texts of the store.
            search (`str`, *optional*): What to look for in the store, or in those texts.
            nearest (`int`, *optional*): How many chunks to find. Default: as many as the model has room for.

        Returns:
            [`RememberedContexts`], or `None` if nothing was asked for.

        Raises:
            RefusedError: If the contexts are too long.
            ValueError: If there is no store, no such text, or a context is empty.
        """
        with self.tokenizer_lock:
            num_tokens = sum(sum(self.processor.cut_context(text).num_tokens) for text in contexts)
        if num_tokens > self.limits.context_tokens:
            message = f"The contexts have {num_tokens} tokens; this server takes {self.limits.context_tokens}."
            raise RefusedError(413, message, "context_length_exceeded")
        parts = [self.remember(text) for text in contexts]
        if text_ids or search is not None:
            if self.store is None:
                raise ValueError("This server has no store; start it with --store, or send the text as `context`.")
            with self.model_lock, self.tokenizer_lock:
                self.store.reload()
                ids = list(text_ids) or None
                used = None if search is None else choose(self.store, search, ids, nearest)
                loaded = self.store.load(ids if used is None else [one.chunk for one in used])
            embeds = loaded["memory_embeds"]
            parts.append(RememberedContexts(embeds, [embeds.shape[1]], loaded.get("memory_num_tokens")))
        if not parts:
            return None
        lengths = [part.memory_num_tokens for part in parts]
        together = torch.cat([part.memory_embeds for part in parts], 1)  # (1, M, D)
        given = [one for one in lengths if one is not None]
        known = torch.cat(given, 1) if len(given) == len(parts) else None
        return RememberedContexts(together, [count for part in parts for count in part.num_memories], known)

    def prompt(self, text: str | Sequence[dict[str, Any]], memories: RememberedContexts | None) -> dict[str, Any]:
        """Lay out a prompt, or the messages of a chat, with memories.

        A prompt is the application's: control tokens in it are control tokens. Of a chat only system messages are;
        memories stand in the first user message, before what is said, unless a part `{"type": "memory"}` is elsewhere,
        or the model reads memories in front alone.

        Raises:
            ValueError: As the processor does.
        """
        counts = {} if memories is None else {"num_memories": [memories.num_memories]}
        if isinstance(text, str):
            # A prompt of memories alone: the slots are all that there is.
            given = text or self.processor.memory_token * len(memories.num_memories if memories else ())
            with self.tokenizer_lock:
                inputs = self.processor(text=[given], return_tensors="pt", **counts)
        else:
            options: dict[str, Any] = {"tokenize": True, "add_generation_prompt": True, "return_tensors": "pt"}
            chat = list(text)
            if self.processor.chat_template is None:
                options["chat_template"] = PLAIN_CHAT
            elif memories is not None and self.model.config.memory_positions not in ("fixed", "spread"):
                chat = with_memories(chat, len(memories.num_memories))
            with self.tokenizer_lock:
                inputs = self.processor.apply_chat_template([chat], **counts, **options)
        prompt = dict(inputs.to(self.model.device))
        if memories is not None:
            prompt["memory_embeds"] = memories.memory_embeds
            if memories.memory_num_tokens is not None:
                prompt["memory_num_tokens"] = memories.memory_num_tokens
        return prompt

    def write(
        self,
        text: str | Sequence[dict[str, Any]],
        memories: RememberedContexts | None = None,
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stops: Sequence[str] = (),
    ) -> Writing:
        """Begin to write what follows; the caller has entered, and the end of the writing leaves.

        Args:
            text (`str`, or messages): See [`prompt`].
            memories ([`RememberedContexts`], *optional*): From [`memories`].
            max_new_tokens (`int`): Most tokens of the answer.
            temperature (`float`): 0 takes the most likely token.
            top_p (`float`): Sample from this much of the probability.
            seed (`int`, *optional*): Makes sampling repeatable.
            stops (`Sequence[str]`): Where the answer ends.

        Raises:
            ValueError: If the prompt does not fit the model.
        """
        try:
            options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
            if temperature > 0:
                options |= {"temperature": temperature, "top_p": top_p}
            writing = Writing(self.prompt(text, memories), options, stops)
        except BaseException:
            self.leave()
            raise
        writing.start(self, seed)
        return writing


def with_memories(chat: Iterable[dict[str, Any]], number: int) -> list[dict[str, Any]]:
    r"""Place memories in the first user message of a chat, unless it places them itself.

    >>> with_memories([{"role": "user", "content": "Who?"}], 1)[0]["content"][:2]
    [{'type': 'memory'}, {'type': 'text', 'text': '\n\n'}]
    """
    chat = list(chat)
    contents = [message.get("content") for message in chat]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    if any(part.get("type") == "memory" for part in parts if isinstance(part, dict)):
        return chat
    front = [{"type": "memory"}, {"type": "text", "text": BETWEEN}] * number
    for place, message in enumerate(chat):
        if message.get("role") == "user":
            content = message.get("content") or ""
            said = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
            return [*chat[:place], {**message, "content": [*front, *said]}, *chat[place + 1 :]]
    return chat
