"""The model `modeling-memory` of lm-evaluation-harness: contexts are read through memories, or in their place.

| mode | the decoder reads |
|---|---|
| `full` | the whole context |
| `memory` | memories of what stands before the last `clear` tokens, then these |
| `truncated` | at as many positions as the memories take: the tokens just before those last ones, then these |
| `none` | the last `clear` tokens alone |
| `unrelated` | memories of another request's first chunk, then the whole context |

A request is cut at the same token in `memory`, `truncated` and `none`, so that these differ in nothing but what stands
before the cut. `unrelated` asks what a memory that has nothing to do with a text takes from the decoder.
"""

import inspect
import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.models.utils_hf import stop_sequences_criteria
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import cached_file

from ..memory_adapters import adapters_on
from ..processing_memory import MemoryProcessor

MODES = ("full", "memory", "truncated", "none", "unrelated")
MAX_SCORED = 4096
"""Columns with logits in one call: a table of 50,000 tokens takes 0.8 GB of them in float32."""

MAX_READ = 65536
"""Columns in one call: a batch of long contexts is smaller than `batch_size`."""
COUNTS = ("requests", "memory_requests", "context_tokens", "memory_tokens", "memories", "cut_tokens")

logger = logging.getLogger(__name__)


class NoMemoryReadError(ValueError):
    """A score that was to be a memory's would have been the plain decoder's."""


@dataclass(frozen=True)
class Reading:
    """A piece of a request that is read at once.

    Attributes:
        before (`list[int]`): Decoder ids before the cut.
        seen (`list[int]`): Decoder ids after it; never none.
        targets (`list[int]`): What the last columns of `seen` are to predict, one each.
        num_context (`int`): Tokens of the request so far, without those of a continuation.
    """

    before: list[int]
    seen: list[int]
    targets: list[int]
    num_context: int


@dataclass(frozen=True)
class Laid:
    """What a model is given for a reading.

    Attributes:
        ids (`list[int]`): Decoder ids: a begin token if one is asked for, slots, text.
        chunks (`list[list[int]]`): Encoder ids of each chunk; none where no memory is read.
        budgets (`list[int]`): Memories of each chunk.
        num_cut (`int`): Tokens that found no room in the decoder.
    """

    ids: list[int]
    chunks: list[list[int]]
    budgets: list[int]
    num_cut: int


def num_compressed(num_tokens: int, clear: int, chunk_length: int, min_chunks: int) -> int:
    """Return how many tokens of a context stand before the cut.

    All but the last `clear`; of a short context `min_chunks` chunks as long as it has them and one token more, and
    else all but its last token.

    >>> [num_compressed(length, clear=8, chunk_length=4, min_chunks=0) for length in (5, 11, 12, 15, 16)]
    [0, 3, 4, 7, 8]
    >>> [num_compressed(length, clear=8, chunk_length=4, min_chunks=2) for length in (1, 5, 9, 12)]
    [0, 4, 8, 8]
    """
    return max(0, min(max(num_tokens - clear, min_chunks * chunk_length), num_tokens - 1))


def describe_counts(mode: str, counts: dict[str, dict[str, int]]) -> list[str]:
    """Return a line for each task: the share of its requests and tokens that went through memories."""
    lines = []
    for task, count in counts.items():
        requests, tokens = max(1, count["requests"]), max(1, count["context_tokens"])
        lines.append(
            f"{task}, mode={mode}: {count['memory_requests'] / requests:.0%} of {count['requests']:,} requests and "
            f"{count['memory_tokens'] / tokens:.0%} of {count['context_tokens']:,} context tokens went through "
            f"{count['memories']:,} memories; {count['cut_tokens']:,} tokens found no room"
        )
    return lines


@register_model("modeling-memory")
class MemoryLM(TemplateLM):
    """A memory encoder-decoder, or a plain causal LM in `mode=full`, for lm-evaluation-harness.

    Args:
        pretrained (`str` or `PreTrainedModel`): Folder, Hub id or loaded model.
        tokenizer (`str`, tokenizer or [`MemoryProcessor`], *optional*): Default: what stands beside the model.
        mode (`str`): One of `full`, `memory`, `truncated`, `none`, `unrelated`.
        clear (`int`, *optional*): Tokens of a context that are read as text. Default: the model's window.
        min_memory_chunks (`int`): Chunks of a context that go before the cut however short it is.
        begin (`bool`): Whether the tokenizer's begin token stands before what is left of a context that was cut: for
            models that were trained so (`data.begin` of a recipe).
        batch_size (`int`): Requests at a time.
        max_batch_size (`int`, *optional*): Not used: the harness gives it to every model.
        device (`str`, *optional*): Default: an accelerator, if there is one.
        dtype (`str`): Of the weights. Default: as they are stored.
        max_gen_toks (`int`): Most new tokens, where a task does not say.
        trust_remote_code (`bool`): As in transformers.

    Raises:
        ValueError: If the mode is unknown, or needs memories that the model has not.
    """

    def __init__(
        self,
        pretrained: Any,
        tokenizer: Any = None,
        mode: str = "memory",
        clear: int | None = None,
        min_memory_chunks: int = 0,
        begin: bool = False,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        dtype: str = "auto",
        max_gen_toks: int = 256,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"`mode` is {mode!r}; expected one of {', '.join(MODES)}.")
        hub = {"trust_remote_code": trust_remote_code}
        self.model = pretrained
        if isinstance(pretrained, str):
            self.model = AutoModelForCausalLM.from_pretrained(pretrained, dtype=dtype, **hub)
        chosen = "cuda" if torch.cuda.is_available() else "cpu"
        # The harness asks for "cuda:0" where nobody chose, also on machines without one.
        wanted = chosen if device is None or (device.startswith("cuda") and chosen == "cpu") else device
        # Dropout would make a score a matter of luck.
        self.model = self.model.to(wanted).eval()
        self._device = self.model.device
        beside = _load_tokenizer(tokenizer or pretrained, hub)
        self.processor = beside if isinstance(beside, MemoryProcessor) else None
        self.tokenizer = beside if self.processor is None else self.processor.tokenizer
        self.mode, self.batch_size, self.max_gen_toks = mode, _count("batch_size", batch_size, 1), max_gen_toks
        self._set_cut(mode, clear, min_memory_chunks, begin)
        self.counts: dict[str, dict[str, int]] = {}

    def _set_cut(self, mode: str, clear: int | None, min_memory_chunks: int, begin: bool) -> None:
        self.has_memories = hasattr(self.model, "encode_memories")
        self.memory_config: Any = self.model.config
        self.decoder = self.model.decoder if self.has_memories else self.model
        self.chunk_length = self.memory_config.chunk_length if self.has_memories else 1
        self.per_chunk = self.memory_config.memories_per_chunk if self.has_memories else 0
        self.begin: list[int] = []
        if not self.has_memories:
            if mode != "full":
                raise ValueError(
                    f"mode={mode} cuts at chunks, and a {type(self.model).__name__} has none. Take mode=full."
                )
            self.clear = self.min_memory_chunks = 0
            return
        if begin and self.tokenizer.bos_token_id is None:
            raise ValueError("`begin` asks for a begin token, and the tokenizer has no bos token. Leave `begin` out.")
        self.begin = [self.tokenizer.bos_token_id] if begin else []
        if mode in ("memory", "unrelated") and self.memory_config.memory_token_id is None:
            raise ValueError(
                "The model's `memory_token_id` is None, so a prompt has no slots for memories. Set it in the config "
                "to an id that no text uses; the vocabulary's size serves."
            )
        self.clear = self.memory_config.window_length if clear is None else _count("clear", clear, 1)
        self.min_memory_chunks = _count("min_memory_chunks", min_memory_chunks, 0)

    @property
    def eot_token_id(self) -> int:
        """Id that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """Id that stands before a text without a context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer, for the harness's caches."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Tokenise as the harness's own model does: with the tokenizer's special tokens unless told otherwise."""
        # Not passed on as None, which tokenizers take for False.
        given = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer.encode(string, **given)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Write a chat as the decoder's template has it."""
        return self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )  # fmt: skip

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes into its results: how requests were read, and what went through memories."""
        return {
            "mode": self.mode,
            "clear": self.clear,
            "min_memory_chunks": self.min_memory_chunks,
            "begin": bool(self.begin),
            "memory_counts": self.counts,
        }

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation in nats, and whether greedy writing gives it."""
        rows, tasks = [], [request.task_name or "request" for request in requests]
        for request in requests:
            context, continuation = request.args
            if context:
                ids, targets = self._encode_pair(context, continuation)
            else:
                # A first token has nothing that predicts it, so one stands before it.
                ids, targets = [self.prefix_token_id], self.tok_encode(continuation, add_special_tokens=False)
            if not targets:
                raise ValueError(f"The continuation {continuation!r} is no token; expected one token or more.")
            rows.append([self._cut(ids, targets)])
        rows = self._with_unrelated(rows)
        self._count_rows(tasks, rows)
        return [(total, greedy) for total, greedy in self._score(rows, disable_tqdm)]

    def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        """Score pairs of ids, for callers that have tokenised themselves."""
        return self._score([[self._cut(context, continuation)] for _, context, continuation in requests], True)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each whole text in nats, however long it is.

        A text is read in pieces of `clear` tokens, each after all that stands before it, in the way of the mode.

        Raises:
            ValueError: In mode `unrelated`, which is for requests with a context.
        """
        if self.mode == "unrelated":
            raise ValueError("mode=unrelated puts a memory before a context, and a rolling text has none.")
        tasks = [request.task_name or "request" for request in requests]
        texts = [self.tok_encode(request.args[0], add_special_tokens=False) for request in requests]
        rows = [list(self._pieces([self.prefix_token_id, *ids])) for ids in texts]
        self._count_rows(tasks, rows)
        return [total for total, _ in self._score(rows, disable_tqdm)]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Write on after each context until a stop sequence."""
        tasks, rows, wanted = [], [], []
        for request in requests:
            context, options = request.args
            options = dict(normalize_gen_kwargs(dict(options), self.max_gen_toks))
            until = handle_stop_sequences(list(options.pop("until")), self.tokenizer.decode(self.eot_token_id))
            # An empty prompt is a valid request, and no model writes after nothing.
            ids = self.tok_encode(context) or [self.prefix_token_id]
            cut = self._cut(ids, [])
            tasks.append(request.task_name or "request")
            rows.append([cut])
            # What is left are options of `generate`, and belongs to it.
            wanted.append((options.pop("max_gen_toks"), until, options))
        rows = self._with_unrelated(rows)
        self._count_rows(tasks, rows, [new for new, _, _ in wanted])
        laid = [self._lay(row[0], new) for row, (new, _, _) in zip(rows, wanted, strict=True)]
        # Batches go by length; the harness expects answers in the order of its requests.
        texts: list[str] = [""] * len(rows)
        bar = tqdm(total=len(rows), disable=disable_tqdm, desc="Writing")
        # A batch has one set of options, and prompts with and without memories are two kinds of call.
        keys = [(bool(one.chunks), repr(want)) for one, want in zip(laid, wanted, strict=True)]
        for batch in self._batches([len(one.ids) for one in laid], keys):
            new, until, options = wanted[batch[0]]
            for i, text in zip(batch, self._write([laid[i] for i in batch], new, until, options), strict=True):
                texts[i] = postprocess_generated_text(text, until, None)
            bar.update(len(batch))
        return texts

    def _cut(self, context: list[int], targets: list[int]) -> Reading:
        """Cut a request where its context ends to be compressed."""
        place = 0
        if self.has_memories and self.mode != "unrelated":
            # In every mode at the same token, so that scores differ by what stands before it alone.
            place = num_compressed(len(context), self.clear, self.chunk_length, self.min_memory_chunks)
        # The last target is predicted and not read.
        return Reading(context[:place], context[place:] + targets[:-1], targets, len(context))

    def _with_unrelated(self, rows: list[list[Reading]]) -> list[list[Reading]]:
        """In mode `unrelated`: before each request the first chunk of a context half of all requests away."""
        if self.mode != "unrelated":
            return rows
        contexts = list(dict.fromkeys(tuple(row[0].seen[: row[0].num_context]) for row in rows))
        if len(contexts) < 2:
            raise ValueError(
                f"mode=unrelated reads a memory of another request, and all {len(rows)} requests have one context. "
                "Give more items."
            )
        # Far away: neighbours in a file are often about the same.
        others = {own: contexts[i - len(contexts) // 2] for i, own in enumerate(contexts)}
        return [
            [replace(one, before=list(others[tuple(one.seen[: one.num_context])][: self.chunk_length])) for one in row]
            for row in rows
        ]

    def _pieces(self, ids: list[int]) -> Iterator[Reading]:
        """Cut a text, one token in front of it, into pieces that predict every token of it once."""
        if self.mode == "full":  # one causal call predicts all that it reads
            room = _room(self.decoder.config) or len(ids)
            step = max(1, min(MAX_SCORED, room // 2))
        else:
            step = -(-self.clear // self.chunk_length) * self.chunk_length  # what is before a piece is whole chunks
        for start in range(0, len(ids) - 1, step):
            end = min(start + step, len(ids) - 1)
            # Every token once: pieces that overlapped would count some twice, and a perplexity is a mean over all.
            yield Reading(ids[:start], ids[start:end], ids[start + 1 : end + 1], end)

    def _chunks(self, before: list[int]) -> list[list[int]]:
        """Encoder ids of what stands before the cut, chunk by chunk."""
        if not before:
            return []
        if self.processor is not None and self.processor.encoder_tokenizer is not None:
            # Two tokenizers share only the text, so the cut is carried over as letters.
            return self.processor.split_context(self.tokenizer.decode(before))
        return [before[i : i + self.chunk_length] for i in range(0, len(before), self.chunk_length)]

    def _lay(self, reading: Reading, num_new: int = 0) -> Laid:
        """Lay out a reading in the way of the mode, its oldest part left out where the decoder has no room."""
        before, seen = reading.before, reading.seen
        begin = self.begin if before else []
        if self.mode in ("full", "none"):
            ids = before + seen if self.mode == "full" else begin + seen
            kept = self._fit(ids, num_new)
            return Laid(kept, [], [], len(ids) - len(kept))
        chunks = self._chunks(before)
        # As many tokens a memory in a chunk that is not full, or its memories would be easier to read; one that is
        # filled has the groups of a full one, some of them empty.
        sizes = [len(chunk) if self.memory_config.short_chunks == "pad" else self.chunk_length for chunk in chunks]
        budgets = [min(self.per_chunk, -(-size * self.per_chunk // self.chunk_length)) for size in sizes]
        left = 0
        while left < len(chunks) and not self.memory_config.fits(
            sum(budgets[left:]), len(begin) + len(seen) + num_new
        ):
            left += 1
        slots = sum(budgets[left:])
        if self.mode == "truncated":
            return Laid(self._fit([*begin, *before[max(0, len(before) - slots) :], *seen], num_new), [], [], 0)
        kept = self._fit(seen, num_new + slots + len(begin))
        num_cut = min(len(before), left * self.chunk_length) + len(seen) - len(kept)
        ids = [*begin, *[self.memory_config.memory_token_id] * slots, *kept]
        return Laid(ids, chunks[left:], budgets[left:], num_cut)

    def _fit(self, ids: list[int], others: int) -> list[int]:
        room = _room(self.decoder.config)
        return ids if room is None else ids[max(0, len(ids) + others - room) :]

    def _count_rows(self, tasks: Sequence[str], rows: list[list[Reading]], news: Sequence[int] | None = None) -> None:
        """Count what goes through memories, task by task, before anything is computed.

        Raises:
            NoMemoryReadError: If no request of a task would read a memory although the mode promises it.
        """
        found: dict[str, dict[str, int]] = {}
        for i, (task, pieces) in enumerate(zip(tasks, rows, strict=True)):
            count = found.setdefault(task, dict.fromkeys(COUNTS, 0))
            last = self._lay(pieces[-1], news[i] if news else 0)  # what is before it is what any piece has before it
            num_read = max(0, len(pieces[-1].before) - last.num_cut) if last.chunks else 0
            numbers = 1, bool(last.chunks), pieces[-1].num_context, num_read, sum(last.budgets)
            for name, number in zip(COUNTS, (*numbers, last.num_cut), strict=True):
                count[name] += number
        for task, count in found.items():
            if self.mode in ("memory", "unrelated") and not count["memory_requests"]:
                raise NoMemoryReadError(
                    f"{task}: none of {count['requests']} requests is long enough for a memory (clear={self.clear}), "
                    "so the score would be the plain decoder's and not a memory's. Give min_memory_chunks=1 or a "
                    "smaller clear, or take mode=full."
                )
            self.counts[task] = count
        for line in describe_counts(self.mode, {task: self.counts[task] for task in found}):
            logger.info(line)

    def _batches(self, lengths: list[int], keys: list[Any]) -> Iterator[list[int]]:
        """Indices of requests that may be read together, the longest first: memory runs out at once or never."""
        groups: dict[Any, list[int]] = defaultdict(list)
        for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            groups[keys[i]].append(i)
        for group in groups.values():
            while group:
                size = max(1, min(self.batch_size, MAX_READ // max(1, lengths[group[0]])))
                yield group[:size]
                group = group[size:]

    def _score(self, rows: list[list[Reading]], disable_tqdm: bool) -> list[tuple[float, bool]]:
        """Log-likelihood of each request, summed over its pieces, and whether all of them are what greedy writes."""
        # Requests that differ in their targets alone, as those of MMLU do, are read once.
        found: dict[Any, tuple[Laid, list[tuple[int, list[int]]]]] = {}
        for owner, piece in ((owner, piece) for owner, pieces in enumerate(rows) for piece in pieces):
            one = self._lay(piece)
            same = found.setdefault((tuple(one.ids), tuple(map(tuple, one.chunks))), (one, []))
            same[1].append((owner, piece.targets))
        laid, wanted = [one for one, _ in found.values()], [targets for _, targets in found.values()]
        widths = [max(len(targets) for _, targets in own) for own in wanted]
        totals, greedy = [0.0] * len(rows), [True] * len(rows)
        bar = tqdm(total=len(laid), disable=disable_tqdm, desc="Scoring")
        for batch in self._batches([len(one.ids) for one in laid], [bool(one.chunks) for one in laid]):
            size = max(1, MAX_SCORED // max(widths[i] for i in batch))
            for part in (batch[i : i + size] for i in range(0, len(batch), size)):
                logits = self._logits([laid[i] for i in part], max(widths[i] for i in part))  # (rows, keep, V)
                for row, i in zip(logits, part, strict=True):
                    scores = row[-widths[i] :].float().log_softmax(-1)  # (N, V)
                    for owner, targets in wanted[i]:
                        ids = torch.tensor(targets, device=row.device)  # (n,), the last of the N columns
                        own = scores[-len(targets) :]
                        totals[owner] += float(own.gather(1, ids[:, None]).double().sum())
                        greedy[owner] &= bool((own.argmax(-1) == ids).all())
                bar.update(len(part))
        return list(zip(totals, greedy, strict=True))

    def _inputs(self, laid: list[Laid]) -> dict[str, torch.Tensor]:
        """Pad requests on the left, so that the last columns of all are their last tokens."""
        width, pad = max(len(one.ids) for one in laid), self.tokenizer.pad_token_id or 0
        inputs = {
            "input_ids": [[pad] * (width - len(one.ids)) + one.ids for one in laid],
            "attention_mask": [[0] * (width - len(one.ids)) + [1] * len(one.ids) for one in laid],
        }
        if laid[0].chunks:
            number, length = max(len(one.chunks) for one in laid), max(len(c) for one in laid for c in one.chunks)
            padded = [one.chunks + [[]] * (number - len(one.chunks)) for one in laid]
            inputs["context_input_ids"] = [[c + [0] * (length - len(c)) for c in row] for row in padded]
            inputs["context_attention_mask"] = [
                [[1] * len(c) + [0] * (length - len(c)) for c in row] for row in padded
            ]
            inputs["context_num_memories"] = [one.budgets + [0] * (number - len(one.budgets)) for one in laid]
        return {name: torch.tensor(value, device=self._device) for name, value in inputs.items()}

    @torch.no_grad()
    def _logits(self, laid: list[Laid], keep: int) -> torch.Tensor:
        """Logits `(rows, keep, V)` of the last columns."""
        inputs: dict[str, Any] = dict(self._inputs(laid))
        if laid[0].chunks:
            return self.model(**inputs, logits_to_keep=keep, use_cache=False).logits
        known = inspect.signature(self.decoder.forward).parameters
        if "position_ids" in known:
            inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        if "logits_to_keep" in known:
            inputs["logits_to_keep"] = keep
        with self._plain():
            return self.decoder(**inputs, use_cache=False).logits[:, -keep:]

    def _plain(self) -> Any:
        """The decoder without adapters that serve memories: called by itself it would use them."""
        return adapters_on(self.decoder, False) if self.has_memories else nullcontext()

    @torch.no_grad()
    def _write(self, laid: list[Laid], new: int, until: list[str], options: dict[str, Any]) -> list[str]:
        """Generate from requests that share their options; returns the new text of each."""
        inputs = self._inputs(laid)
        width = inputs["input_ids"].shape[1]
        model = self.model if laid[0].chunks else self.decoder
        if not options.get("do_sample"):
            options = {**options, "temperature": None, "top_p": None, "top_k": None}
        with nullcontext() if laid[0].chunks else self._plain():
            ids = model.generate(
                **inputs, **options, max_new_tokens=new, pad_token_id=self.tokenizer.pad_token_id or 0,
                eos_token_id=self.eot_token_id,
                stopping_criteria=stop_sequences_criteria(self.tokenizer, until, width, len(laid)),
            )  # fmt: skip
        return self.tokenizer.batch_decode(ids[:, width:], skip_special_tokens=True)


def _load_tokenizer(given: Any, hub: dict[str, Any]) -> Any:
    """What stands beside a model: its processor, else its tokenizer."""
    if not isinstance(given, str):
        if hasattr(given, "encode_memories") or isinstance(given, torch.nn.Module):
            raise ValueError("A loaded model brings no tokenizer; give its tokenizer or processor as `tokenizer`.")
        return given
    missing = {"_raise_exceptions_for_missing_entries": False}
    if cached_file(given, "processor_config.json", **missing) is not None:
        return MemoryProcessor.from_pretrained(given)
    return AutoTokenizer.from_pretrained(given, **hub)


def _count(name: str, given: Any, least: int) -> int:
    if not str(given).isdigit() or int(given) < least:
        raise ValueError(f"`{name}` is {given!r}; expected a whole number of {least} or more.")
    return int(given)


def _room(config: Any) -> int | None:
    """Positions of a decoder."""
    return getattr(config, "max_position_embeddings", None)
