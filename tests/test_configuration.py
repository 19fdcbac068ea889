"""What a configuration promises about lengths and layouts, and what tools read off it."""

import re

import pytest
from transformers import AutoConfig, MistralConfig

from modeling_memory import MemoryEncoderDecoderConfig
from modeling_memory.configuration_checks import check_fields, check_rules
from tests.conftest import tiny_decoder_config, tiny_encoder_config


def config(**fields) -> MemoryEncoderDecoderConfig:
    parts = {"encoder": tiny_encoder_config("llama"), "decoder": tiny_decoder_config()}  # 128 positions each
    return MemoryEncoderDecoderConfig(**{**parts, "chunk_length": 4, "window_length": 8, **fields})


def test_source_positions_are_bounded_by_tokens():
    """A memory takes the positions of its tokens, so the decoder's table bounds the full text, not the vectors."""
    source = config(memory_positions="source", memories_per_chunk=2)
    assert source.max_memories is None and source.text_start is None
    assert source.memory_capacity == (128 - 8) // 4 * 2
    assert source.max_position_embeddings == 128
    assert source.fits(60, 8) and not source.fits(60, 9) and not source.fits(61, 8)
    assert source.num_places == 4


def test_source_positions_count_whole_chunks_within_what_the_decoder_sees():
    # A memory of a group of 2 or 1 tokens: whole chunks count, whatever their groups.
    uneven = config(memory_positions="source", memories_per_chunk=3)
    assert [uneven.positions_of(number) for number in (0, 1, 3, 4)] == [0, 4, 4, 8]
    assert uneven.memory_capacity == (128 - 8) // 4 * 3
    bounded = config(memory_positions="source", max_memories=3)
    assert bounded.memory_capacity == 3 and bounded.max_position_embeddings == 8 * 2
    with pytest.raises(ValueError, match="`max_memories`.*31, of 4 positions each.*need 132 positions.*see 128"):
        config(memory_positions="source", max_memories=31)
    with pytest.raises(ValueError, match="`memory_positions` is 'source'"):
        config(memory_positions="source", absent_memories="ones")
    sliding = MistralConfig(vocab_size=96, hidden_size=32, sliding_window=16, max_position_embeddings=128)
    assert config(memory_positions="source", decoder=sliding).memory_capacity == 16 - 8, "columns, not positions"


def test_the_longest_text_can_be_told_to_tools(tmp_path):
    bounded = config(max_memories=8)
    assert bounded.max_position_embeddings == 8 * 5
    assert config(max_memories=8, self_memory=False).max_position_embeddings == 128
    free = config(max_memories=8, memory_policy="drop_oldest")
    assert free.max_position_embeddings is None
    for known, told in ((free, 1024), (bounded, 24)):
        known.save_pretrained(tmp_path)
        loaded = AutoConfig.from_pretrained(tmp_path, max_position_embeddings=told)
        assert loaded.max_position_embeddings == told
        loaded.save_pretrained(tmp_path)
        again = AutoConfig.from_pretrained(tmp_path)
        assert again.max_position_embeddings == told
        again.max_position_embeddings = None
        assert again.max_position_embeddings == known.max_position_embeddings
    for value in (41, 0, -1, True, 1.5, "8"):
        with pytest.raises(ValueError, match="expected a positive number of tokens, at most the 40"):
            bounded.max_position_embeddings = value
    with pytest.raises(ValueError, match="expected a positive number of tokens, or None"):
        config(max_memories=8, memory_policy="drop_oldest", max_position_embeddings=0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"memory_policy": "merge"}, "`memory_policy` is 'merge'; expected one of 'error', 'drop_oldest'"),
        ({"pooling": ["last"]}, r"`pooling` is \['last'\]; expected one of"),
        ({"pooling": "concat", "projector_type": "identity"}, "takes one state, but .* up to 4 side by side"),
        ({"pooling": "concat", "memories_per_chunk": 2, "max_group": 1}, "`max_group` is 1.*larger groups"),
        ({"max_group": 4}, "only `pooling='concat'` has places"),
        ({"lookback": 1}, "only `pooling='concat'` has places for earlier tokens"),
        ({"encoder_bos_token_id": -1}, "`encoder_bos_token_id` is -1; expected an integer of 0 or more, or None"),
        ({"encoder_bos_token_id": 10**6}, "`encoder_bos_token_id` is 1000000, but the encoder's token table has"),
        ({"pooling": "concat", "lookback": -1}, "`lookback` is -1; expected an integer from 0 on"),
        ({"pooling": "concat", "max_group": 0}, "`max_group` is 0; expected an integer from 1 on"),
        ({"projector_start": "zero"}, "`projector_start` is 'zero'; expected one of 'random', 'identity_on_last'"),
        ({"projector_start": "identity_on_last", "projector_type": "mlp"}, "is for `projector_type='linear'`"),
        (
            {"projector_start": "identity_on_last", "encoder": tiny_encoder_config("llama", hidden_size=16)},
            "needs equal widths, but the encoder has 16 and the decoder 32",
        ),
        ({"encoder_layers": 1}, "`encoder_layers` is 1, but the encoder's config says otherwise"),
        ({"encoder_layers": -1}, "`encoder_layers` is -1; expected an integer from 0 on"),
        ({"format_version": 2}, "`format_version` is 2; expected 1 to 1.*newer release"),
        ({"format_version": True}, "`format_version` is True"),
    ],
)
def test_fields_that_do_not_fit(fields, message):
    with pytest.raises(ValueError, match=message):
        config(**fields)


def test_the_places_of_concat_follow_the_chunk():
    assert config(pooling="concat", memories_per_chunk=3).max_group == 2
    assert config(pooling="concat", memories_per_chunk=3).least_memories == 2
    assert config(pooling="concat", memories_per_chunk=4, max_group=4).least_memories == 1
    assert config().max_group is None and config().least_memories == 1


def test_tables_name_the_field_and_the_remedy():
    fields = [("chunk_length window_length", lambda value: value > 5, "more than 5")]
    with pytest.raises(ValueError, match="`chunk_length` is 4; expected more than 5"):
        check_fields(config(), fields)
    with pytest.raises(ValueError, match="32 is the width"):
        check_rules(config(), [(lambda c: False, "{c.hidden_size} is the width")])


def test_the_vocabulary_is_set_for_all_who_read_its_ids():
    config = MemoryEncoderDecoderConfig(encoder=tiny_encoder_config("llama"), decoder=tiny_decoder_config())
    config.vocab_size = 50
    assert (config.vocab_size, config.decoder.vocab_size, config.encoder.vocab_size) == (50, 50, 50)
    two_tokenizers = MemoryEncoderDecoderConfig(
        encoder=tiny_encoder_config("llama"), decoder=tiny_decoder_config(), self_memory=False
    )
    two_tokenizers.vocab_size = 50
    assert (two_tokenizers.decoder.vocab_size, two_tokenizers.encoder.vocab_size) == (50, 96)
    for value in (0, -1, 2.5, "many", None):
        with pytest.raises(ValueError, match=re.escape(f"`vocab_size` is {value!r}; expected a positive integer")):
            config.vocab_size = value
