"""Optimising a text's vectors, one text at a time and Adam written out."""

import torch


def loss_after(decoder, vectors: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of a text `(T,)` that a causal LM writes after vectors `(K, D)`, token by token."""
    table = decoder.get_input_embeddings()
    losses = []
    for number, token in enumerate(tokens):
        seen = torch.cat([vectors, table(tokens[:number])])[None]
        losses.append(
            -torch.log_softmax(decoder(inputs_embeds=seen, use_cache=False).logits[0, -1].float(), -1)[token]
        )
    return torch.stack(losses).mean()


def optimise(decoder, start: torch.Tensor, tokens: torch.Tensor, steps: int, learning_rate: float) -> torch.Tensor:
    """Vectors `(K, D)` after so many steps of Adam in units of the start's scale, the rate falling linearly."""
    scale = (start**2).mean().sqrt()
    units = start / scale
    first, second = torch.zeros_like(units), torch.zeros_like(units)
    for step in range(1, steps + 1):
        units = units.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss_after(decoder, units * scale, tokens), units)
        rate = learning_rate * (1 - 0.9 * (step - 1) / steps)
        first = 0.9 * first + 0.1 * gradient
        second = 0.95 * second + 0.05 * gradient**2
        mean, spread = first / (1 - 0.9**step), (second / (1 - 0.95**step)).sqrt()
        units = units - rate * mean / (spread + 1e-8)
    return (units * scale).detach()
