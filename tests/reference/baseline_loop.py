"""Recurrent and oracle memories, one text and one column at a time.

Source: Badger 2026, arXiv 2602.13466, recurrent memory, oracle memory.
"""

import torch

from tests.reference.mixer_loop import affine


def last_logits(decoder, columns: list[torch.Tensor]) -> torch.Tensor:
    """Logits `(V,)` after a list of input vectors."""
    return decoder(inputs_embeds=torch.stack(columns)[None], use_cache=False).logits[0, -1]


def recurrent_loop(model, text: torch.Tensor) -> torch.Tensor:
    """Logits `(T, V)` of one text; every column is computed from the columns before it alone."""
    decoder, width = model.decoder, model.window_length
    table = decoder.get_input_embeddings().weight
    memory = torch.full_like(table[0], model.start)
    logits = []
    for start in range(0, len(text), width):
        columns = [memory]
        for token in text[start : start + width]:
            columns.append(table[token])
            logits.append(last_logits(decoder, columns))
        columns.append(memory)
        states = decoder.base_model(inputs_embeds=torch.stack(columns)[None], use_cache=False).last_hidden_state
        memory = states[0, -1]
    return torch.stack(logits)


def oracle_loop(model, text: torch.Tensor) -> torch.Tensor:
    """Logits `(T, V)` of one text, without noise."""
    state = model.encoder(input_ids=text[None]).last_hidden_state[0, -1]
    if model.freeze_encoder:
        state = state.detach()
    if model.bottleneck is not None:
        state = affine(state, model.bottleneck.down)
        if model.kind != "embedding":
            state = affine(state, model.bottleneck.up)
    if isinstance(model.bridge, torch.nn.Linear):
        state = affine(state, model.bridge)
    columns = [state] if model.kind == "token" else []
    logits = []
    for token in text:
        embed = model.table.weight[token]
        if model.kind == "embedding":
            embed = torch.cat([state, embed])
        elif model.kind == "projection":
            embed = embed + state
        columns.append(embed)
        logits.append(last_logits(model.decoder, columns))
    return torch.stack(logits)
