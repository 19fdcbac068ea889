"""The projector: from the encoder's width into the decoder's input space."""

import torch
from torch import nn
from transformers import initialization as init
from transformers.configuration_utils import PreTrainedConfig


class MemoryProjector(nn.Module):
    """Carry memory states of encoder width into the decoder's input space.

    `linear` is the paper's affine map; `mlp` is RMSNorm, linear, GELU, linear; `bottleneck` is down, noise (only while
    training), up, linear; `identity` changes nothing. `projector_norm` puts an RMSNorm in front of any of them.

    Args:
        config ([`MemoryEncoderDecoderConfig`]): Widths and kind.

    Source: Badger 2026, arXiv 2602.13466, projection adapter; the noise follows its quantisation study, but is
    centred.
    """

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        encoder_size, decoder_size = config.encoder.hidden_size, config.decoder.hidden_size
        self.noise = config.projector_noise
        self.norm = nn.RMSNorm(encoder_size, eps=1e-6) if config.projector_norm else nn.Identity()
        self.down = self.up = self.hidden = nn.Identity()
        if config.projector_type == "bottleneck":
            bottleneck_size = config.projector_hidden_size or max(1, encoder_size // 4)
            self.down, self.up = (
                nn.Linear(encoder_size, bottleneck_size),
                nn.Linear(bottleneck_size, encoder_size),
            )
        inner_size = encoder_size
        if config.projector_type == "mlp":
            inner_size = config.projector_hidden_size or decoder_size
            self.hidden = nn.Sequential(nn.Linear(encoder_size, inner_size), nn.GELU())
        self.out = nn.Identity() if config.projector_type == "identity" else nn.Linear(inner_size, decoder_size)

    def forward(self, memory_states: torch.Tensor) -> torch.Tensor:
        """Project memory states `(..., E)` to memory embeds `(..., D)`."""
        return self.out(self.features(memory_states))

    def features(self, memory_states: torch.Tensor) -> torch.Tensor:
        """Give what the last affine map reads of memory states `(..., E)`."""
        code = self.down(self.norm(memory_states))
        if self.training and self.noise:
            code = code + torch.empty_like(code).uniform_(-self.noise, self.noise)
        return self.hidden(self.up(code))

    def initialize(self, output_scale: float) -> None:
        """Draw fresh weights such that inputs of unit scale give outputs of root mean square `output_scale`."""
        for module in self.modules():
            if isinstance(module, nn.RMSNorm):
                init.ones_(module.weight)
            elif isinstance(module, nn.Linear):
                gain = output_scale if module is self.out else 1.0
                init.normal_(module.weight, mean=0.0, std=gain * module.in_features**-0.5)
                init.zeros_(module.bias)
