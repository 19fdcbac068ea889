"""TRL's trainers take a step on a memory model: chats, contexts in slots, preferences, rewards; peft from outside."""

import peft
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from modeling_memory import MemoryProcessor
from tests.conftest import build_tiny_tokenizer
from tests.memory_models import CHUNK, WINDOW, build_model

# TRL's and peft's own calls of the library, under names that it has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
TEMPLATE = (
    "{% for turn in messages %}{{ turn.role + ': ' }}{% if turn.role == 'assistant' %}{% generation %}"
    "{{ turn.content + eos_token }}{% endgeneration %}{% else %}{{ turn.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
QUESTION = [{"role": "user", "content": "What did the sign say, and where did it stand?"}]
CHATS = [[*QUESTION, {"role": "assistant", "content": answer}] for answer in ("the red one.", "no")]
CONTEXTS = ["the sign stood in the land there.", "on the red road"]


@pytest.fixture
def processor():
    return MemoryProcessor(build_tiny_tokenizer(), chunk_length=CHUNK, window_length=WINDOW, chat_template=TEMPLATE)


def build(wrapped=False, model=None):
    model = build_model() if model is None else model
    targets = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["projector"])
    return peft.get_peft_model(model, targets) if wrapped else model


def options(kind, folder, **fields):
    common = {"max_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1}
    quiet = {"report_to": [], "use_cpu": True, "bf16": False, "save_strategy": "no", "disable_tqdm": True}
    return kind(output_dir=str(folder), **common, **quiet, **fields)


def take_a_step(trainer):
    """Train, and return what was logged; all that is trained moved, and nothing else."""
    model = trainer.model
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer.train()
    for name, parameter in model.named_parameters():
        # Of fresh adapters one factor is zero, and so is the other's first gradient.
        moves = parameter.requires_grad and "lora_A" not in name
        assert torch.equal(parameter, before[name]) is not moves, name
    return trainer.state.log_history[0]


def chat_inputs(processor, contexts=None):
    """Chats as inputs, with labels where the template says that the assistant speaks."""
    batch = processor.apply_chat_template(
        CHATS, context=contexts, tokenize=True, return_assistant_tokens_mask=True, return_tensors="pt"
    )
    batch["labels"] = batch["input_ids"].masked_fill(batch.pop("assistant_masks") == 0, -100)
    return dict(batch)


@pytest.mark.parametrize("wrapped", [False, True], ids=["whole", "peft"])
def test_sft_learns_what_the_assistant_says_and_nothing_else(wrapped, processor, tmp_path):
    """Of chats longer than a window, with the loss that the model itself has of the same tokens."""
    args = options(SFTConfig, tmp_path, assistant_only_loss=True)
    data = Dataset.from_dict({"messages": CHATS})
    trainer = SFTTrainer(build(wrapped), args=args, train_dataset=data, processing_class=processor)
    expected = build()(**chat_inputs(processor)).loss
    assert take_a_step(trainer)["loss"] == pytest.approx(expected.item(), abs=1e-4)


def test_sft_learns_answers_from_contexts_in_slots(processor, tmp_path):
    args = options(SFTConfig, tmp_path, remove_unused_columns=False, dataset_kwargs={"skip_prepare_dataset": True})
    data = Dataset.from_dict({"messages": CHATS, "labels": [[0]] * 2})  # TRL asks for labels; the collator makes them
    trainer = SFTTrainer(
        build(), args=args, train_dataset=data, processing_class=processor,
        data_collator=lambda rows: chat_inputs(processor, CONTEXTS),
    )  # fmt: skip
    expected, without = build()(**chat_inputs(processor, CONTEXTS)).loss, build()(**chat_inputs(processor)).loss
    assert abs(expected - without) > 1e-2
    assert take_a_step(trainer)["loss"] == pytest.approx(expected.item(), abs=1e-4)


@pytest.mark.parametrize("wrapped", [False, True], ids=["whole", "peft"])
def test_dpo_prefers(wrapped, processor, tmp_path):
    """The reference is loaded anew from the folder, or is the model without its adapters."""
    build_model().save_pretrained(tmp_path / "model")
    model = build(wrapped, AutoModelForCausalLM.from_pretrained(tmp_path / "model"))
    data = {"prompt": [QUESTION] * 2, "chosen": [CHATS[0][1:]] * 2, "rejected": [CHATS[1][1:]] * 2}
    trainer = DPOTrainer(
        model, args=options(DPOConfig, tmp_path / "run"), train_dataset=Dataset.from_dict(data),
        processing_class=processor,
    )  # fmt: skip
    logged = take_a_step(trainer)
    assert logged["loss"] == pytest.approx(0.6931, abs=1e-3), "both models are equal before the first step"
    assert logged["logps/chosen"] < logged["logps/rejected"] < 0


@pytest.mark.parametrize("wrapped", [False, True], ids=["whole", "peft"])
def test_grpo_writes_and_is_rewarded(wrapped, processor, tmp_path):
    """Of every processor TRL asks where its images are, so it is given the tokenizer, which knows the template."""
    tokenizer = processor.tokenizer
    tokenizer.chat_template = TEMPLATE
    args = options(GRPOConfig, tmp_path, num_generations=2, max_completion_length=12)
    written = []

    def reward(completions, completion_ids, **_):
        written.extend(completion_ids)
        return [0.0, 1.0]

    trainer = GRPOTrainer(
        build(wrapped), reward_funcs=reward, args=args, processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"prompt": [QUESTION]}),
    )  # fmt: skip
    assert take_a_step(trainer)["reward"] == 0.5
    assert [len(ids) for ids in written] == [12, 12] and processor.memory_token_id not in sum(written, [])
