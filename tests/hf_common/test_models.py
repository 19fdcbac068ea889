"""The library's own tests of models, on every way of using ours."""

import copy
from typing import Any, ClassVar

import pytest
import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

from modeling_memory import (
    MaskedMixerForCausalLM,
    MaskedMixerModel,
    MemoryAutoencoder,
    MemoryEncoderDecoderForCausalLM,
    MemoryEncoderDecoderModel,
)
from tests.hf_common.exceptions import EXCEPTIONS
from tests.hf_common.library import GenerationTesterMixin, ModelTesterMixin, TestCase
from tests.hf_common.testers import (
    CHUNK,
    SLOT,
    WINDOW,
    AutoencoderTester,
    MixerTester,
    OneWindowTester,
    SlotsTester,
    WindowsTester,
)

pytestmark = [pytest.mark.hf_common, pytest.mark.filterwarnings("default::FutureWarning")]


class Common(ModelTesterMixin):
    """What all of our testers share."""

    way: ClassVar[Any] = None
    test_can_init_all_missing_weights_before_2023 = True  # our files bear no year; the test is to run

    @pytest.fixture(autouse=True)
    def _known_to_the_library(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Tell the library which of our classes have a head, as its lists tell it of its own."""
        for model_type, model, causal in (
            ("memory_encoder_decoder", "MemoryEncoderDecoderModel", "MemoryEncoderDecoderForCausalLM"),
            ("masked_mixer", "MaskedMixerModel", "MaskedMixerForCausalLM"),
        ):
            monkeypatch.setitem(MODEL_MAPPING_NAMES, model_type, model)
            monkeypatch.setitem(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, model_type, causal)

    def setUp(self) -> None:
        self.model_tester = self.way(self)

    def _models(self) -> Any:
        """Every class, as a model in `eval()` mode, with its inputs."""
        for model_class in self.all_model_classes:
            config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
            yield model_class(config).eval(), self._prepare_for_class(inputs, model_class)


class Memory(Common, GenerationTesterMixin):
    """Both classes of the memory model."""

    all_model_classes = (MemoryEncoderDecoderModel, MemoryEncoderDecoderForCausalLM)
    _is_composite = True


class OneWindowTest(Memory, TestCase):
    way = OneWindowTester

    def check_training_gradient_checkpointing(self, gradient_checkpointing_kwargs: Any = None) -> None:
        # The test watches the first layer of the model, which is the encoder's, and a text of one window runs none.
        self.model_tester.num_encoder_layers = 0
        super().check_training_gradient_checkpointing(gradient_checkpointing_kwargs)


class WindowsTest(Memory, TestCase):
    """Several windows: their attentions, and embeddings that would have to become memories, are refused."""

    way = WindowsTester

    def _assert_attentions_refused(self) -> None:
        for model, inputs in self._models():
            with self.assertRaisesRegex(ValueError, "`output_attentions` was asked of a text of 3 windows"):
                model(**inputs, output_attentions=True)

    def test_attention_outputs(self) -> None:
        self._assert_attentions_refused()

    def test_capture_outputs_decorator(self) -> None:
        self._assert_attentions_refused()

    def test_model_outputs_equivalence(self) -> None:
        self.has_attentions = False  # all the rest of the test
        super().test_model_outputs_equivalence()

    def test_retain_grad_hidden_states_attentions(self) -> None:
        # The logits are computed window by window; states laid over the text are copies, whose gradients reach the
        # parameters, but which the logits do not pass through.
        for model, inputs in self._models():
            states = model(**inputs, output_hidden_states=True).hidden_states
            for state in (states[0], states[-1]):
                model.zero_grad()
                state.sum().backward(retain_graph=True)
                self.assertGreater(model.get_input_embeddings().weight.grad.abs().sum(), 0)

    def test_inputs_embeds(self) -> None:
        for model, inputs in self._models():
            embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
            with self.assertRaisesRegex(ValueError, f"`inputs_embeds` has {embeds.shape[1]} columns"):
                model(inputs_embeds=embeds, **inputs)

    def test_inputs_embeds_matches_input_ids(self) -> None:
        for model, inputs in self._models():
            short = {name: value[:, :WINDOW] for name, value in inputs.items()}
            embeds = model.get_input_embeddings()(short.pop("input_ids"))
            expected = model(**{name: value[:, :WINDOW] for name, value in inputs.items()})[0]
            torch.testing.assert_close(model(inputs_embeds=embeds, **short)[0], expected)


class SlotsTest(Memory, TestCase):
    """A context and its slots. Embeddings hold no slots: memories that come with embeddings stand in front."""

    way = SlotsTester
    additional_model_inputs: ClassVar[list[str]] = ["context_input_ids"]

    def _prepare_for_class(self, inputs: dict[str, Any], model_class: type, return_labels: bool = False) -> dict:
        """Lay the slots again, which a test may have overwritten; none has a label."""
        inputs = super()._prepare_for_class(inputs, model_class, return_labels)
        inputs["input_ids"][:, self.model_tester.slots] = SLOT
        if "labels" in inputs:
            inputs["labels"][:, self.model_tester.slots] = -100
        return inputs

    def test_inputs_embeds(self) -> None:
        for model, inputs in self._models():
            text = inputs["input_ids"][:, self.model_tester.slots.stop :]
            context = inputs["context_input_ids"]
            embeds = model.get_input_embeddings()(text)
            slots = torch.full((len(text), context.shape[1]), SLOT)
            expected = model(input_ids=torch.cat([slots, text], 1), context_input_ids=context)[0]
            actual = model(inputs_embeds=embeds, context_input_ids=context)[0]
            torch.testing.assert_close(actual, expected[:, context.shape[1] :])

    def test_inputs_embeds_matches_input_ids(self) -> None:
        self.test_inputs_embeds()


class MixerTest(Common, GenerationTesterMixin, TestCase):
    all_model_classes = (MaskedMixerModel, MaskedMixerForCausalLM)
    way = MixerTester
    has_attentions = False  # its mixing weights are parameters, the same for every text


class AutoencoderTest(Common, TestCase):
    all_model_classes = (MemoryAutoencoder,)
    way = AutoencoderTester
    _is_composite = True

    def _prepare_for_class(self, inputs: dict[str, Any], model_class: type, return_labels: bool = False) -> dict:
        """The library knows no head of this kind: the labels are the chunk."""
        inputs = copy.deepcopy(inputs)
        if return_labels:
            inputs["labels"] = torch.zeros_like(inputs["input_ids"])
        return inputs


def test_every_exception_names_a_test() -> None:
    assert CHUNK < WINDOW  # else a text of one window would be one chunk, and slots were no shorter than the text
    for name in EXCEPTIONS:
        owner, _, test = name.partition("::")
        assert hasattr(globals()[owner], test), name
