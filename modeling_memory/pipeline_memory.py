"""Questions about contexts that are read once: a pipeline of transformers for memory encoder-decoders.

```python
answer = pipeline("memory-question-answering", model=folder, trust_remote_code=True)
answer(context=text, question=["Who built it?", "When?"])      # the text is encoded once
text_memories = answer.remember(text)                          # or before, for questions that come later
for piece in answer.stream(text_memories, "Who built it?"):
    print(piece, end="")
```

M memories of all contexts together, B questions, D decoder width.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from threading import Thread
from typing import Any

import torch
from transformers import TextIteratorStreamer
from transformers.pipelines.base import Pipeline

TASK = "memory-question-answering"
CUSTOM_PIPELINES = {TASK: {"impl": "pipeline_memory.MemoryQuestionAnswering", "pt": ["AutoModelForCausalLM"]}}
"""What a saved config says of this file, so that `pipeline` finds it in the folder."""
BETWEEN = "\n\n"  # memories and question; models are trained to be asked so


@dataclass(frozen=True)
class RememberedContexts:
    """Contexts as memories, ready for any number of questions.

    Attributes:
        memory_embeds (`torch.FloatTensor` of shape `(1, M, D)`): The memories, those of all contexts in order.
        num_memories (`list` of `int`): Memories of each context.
        memory_num_tokens (`torch.LongTensor` of shape `(1, M)`, *optional*): How many tokens each stands for. Default:
            those of full chunks.
    """

    memory_embeds: torch.Tensor
    num_memories: list[int]
    memory_num_tokens: torch.Tensor | None = None


class MemoryQuestionAnswering(Pipeline):
    """Answers questions about one or several contexts from their memories, in the decoder's chat template.

    Options of the call that it does not know go to `generate`; by default it takes the most likely token, 64 at most.
    """

    _load_processor = True
    _load_tokenizer = False
    _load_image_processor = False
    _load_feature_extractor = False

    def _sanitize_parameters(self, **options: Any) -> tuple[dict, dict, dict]:
        return {}, options, {}

    def __call__(
        self,
        inputs: Mapping[str, Any] | None = None,
        *,
        context: str | Sequence[str] | RememberedContexts | None = None,
        question: str | Sequence[str] | None = None,
        memories_per_chunk: int | None = None,
        batch_size: int = 8,
        **options: Any,
    ) -> dict[str, str] | list[dict[str, str]]:
        """Answer one question or many; the contexts are encoded once for all of them.

        Args:
            inputs (`Mapping`, *optional*): `context` and `question` together, as other pipelines take them.
            context (`str`, sequence of `str`, or [`RememberedContexts`]): What the questions are about: one text,
                several, or what [`remember`] gave.
            question (`str` or sequence of `str`): What is asked.
            memories_per_chunk (`int`, *optional*): Fewer memories of a chunk than the model has at most.
            batch_size (`int`): Questions that are answered at once.
            options: Of `generate`, such as `max_new_tokens` or `streamer`.

        Returns:
            `dict` with `question` and `answer`, or for a sequence of questions a list of them, in their order.

        Raises:
            ValueError: If context or question are missing or no text, or the model has no chat template.
        """
        if inputs is not None:
            if not isinstance(inputs, Mapping) or set(inputs) != {"context", "question"}:
                raise ValueError(
                    f"The pipeline was given {inputs!r:.60}; expected context=... and question=..., or a dictionary "
                    "with these two."
                )
            context, question = inputs["context"], inputs["question"]
        questions = [question] if isinstance(question, str) else list(question or ())
        wrong = next((one for one in questions if not isinstance(one, str) or not one.strip()), None)
        if not questions or wrong is not None:
            raise ValueError(f"`question` is {question!r:.60}; expected a text, or a list of texts.")
        if isinstance(context, RememberedContexts) and memories_per_chunk is not None:
            raise ValueError(
                "`memories_per_chunk` was chosen when the contexts were remembered; give it to `remember`."
            )
        given = isinstance(context, RememberedContexts)
        remembered: Any = context if given else self.remember(context, memories_per_chunk)
        # Greedy unless asked otherwise: an answer from a text should be the same tomorrow.
        settings = {"max_new_tokens": 64, "do_sample": False, **self._forward_params, **options}
        answers: list[str] = []
        for start in range(0, len(questions), batch_size):
            prompts = self.preprocess(questions[start : start + batch_size], memories=remembered)
            answers += self.postprocess(self.forward(prompts, **settings))
        found = [{"question": one, "answer": reply} for one, reply in zip(questions, answers, strict=True)]
        return found[0] if isinstance(question, str) else found

    @torch.no_grad()
    def remember(self, context: Any, memories_per_chunk: int | None = None) -> RememberedContexts:
        """Encode contexts, once for all questions to come.

        Args:
            context (`str` or sequence of `str`): One text or several.
            memories_per_chunk (`int`, *optional*): Fewer memories of a chunk than the model has at most.

        Raises:
            ValueError: If there is no text in it.
        """
        texts = [context] if isinstance(context, str) else list(context or ())
        if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
            raise ValueError(f"`context` is {context!r:.60}; expected a text, or a list of texts.")
        per_chunk = self.processor.memories_per_chunk if memories_per_chunk is None else memories_per_chunk
        # Counted before encoding, since the batch of chunks no longer says which context each belongs to.
        counts = [len(self.processor.split_context(text)) for text in texts]
        # All contexts in one row: every question sees all of them.
        inputs = self.processor(context=[texts], context_num_memories=memories_per_chunk, return_tensors="pt")
        inputs = inputs.to(self.model.device)
        embeds, _, num_tokens = self.model.encode_memories(
            inputs["context_input_ids"], inputs["context_attention_mask"], inputs.get("context_num_memories"),
            return_num_tokens=True,
        )  # fmt: skip
        return RememberedContexts(embeds, [per_chunk * count for count in counts], num_tokens)

    def stream(self, context: Any, question: str, **options: Any) -> Iterator[str]:
        """Answer one question piece by piece, as it is written.

        Args:
            context (`str`, sequence of `str`, or [`RememberedContexts`]): As in a call.
            question (`str`): What is asked.
            options: As in a call.

        Yields:
            `str`: The next piece.

        Raises:
            ValueError: As a call.
        """
        # By the tokenizer itself: only the processor knows slots, and those stand in the prompt, which is skipped.
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        failed: list[BaseException] = []

        def run() -> None:
            try:
                self(context=context, question=question, streamer=streamer, **options)
            except BaseException as error:  # it belongs to whoever reads the pieces, who would wait for ever
                failed.append(error)
                streamer.end()

        writer = Thread(target=run)
        writer.start()
        yield from streamer
        writer.join()
        if failed:
            raise failed[0]

    def preprocess(self, input_: Sequence[str], memories: RememberedContexts, **_: Any) -> dict[str, Any]:
        """Lay questions out as chats, the memories of each context in the user's turn before the question."""
        places = [{"type": "memory"}, {"type": "text", "text": BETWEEN}] * len(memories.num_memories)
        chats = [[{"role": "user", "content": [*places, {"type": "text", "text": question}]}] for question in input_]
        inputs = self.processor.apply_chat_template(
            chats,
            num_memories=[memories.num_memories] * len(chats),
            tokenize=True,
            add_generation_prompt=True,
            # Whatever the tokenizer's own side is: on the right the first token would be drawn from padding.
            padding_side="left",
            return_tensors="pt",
        )
        # A view: a hundred questions share the memories of their context.
        ready = {"memory_embeds": memories.memory_embeds.expand(len(chats), -1, -1)}  # (B, M, D)
        if memories.memory_num_tokens is not None:
            ready["memory_num_tokens"] = memories.memory_num_tokens.expand(len(chats), -1)
        return {**inputs, **ready}

    def _forward(self, input_tensors: dict[str, Any], **generate_kwargs: Any) -> dict[str, torch.Tensor]:
        written = self.model.generate(**input_tensors, **generate_kwargs)
        return {"written": written[:, input_tensors["input_ids"].shape[1] :]}

    def postprocess(self, model_outputs: dict[str, torch.Tensor], **_: Any) -> list[str]:
        """Read the answers."""
        return [
            text.strip() for text in self.processor.batch_decode(model_outputs["written"], skip_special_tokens=True)
        ]


__all__ = ["MemoryQuestionAnswering", "RememberedContexts"]
