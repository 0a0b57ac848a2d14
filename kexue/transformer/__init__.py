"""One compact Transformer: residual stack, attention, feed-forward, positions; GPT-2, BERT and T5 are its special cases."""

from kexue.transformer.huggingface import from_hf_bert, from_hf_gpt2, from_hf_t5
from kexue.transformer.layers import (
    FeedForward,
    MultiHeadAttention,
    RelativeBias,
    activations,
    causal_mask,
    padding_mask,
    prefix_mask,
    relative_bucket,
    rotary,
    sinusoids,
)
from kexue.transformer.model import Cache, Config, EncoderDecoder, Trace, Transformer
from kexue.transformer.residual import ResidualStack, deepnorm_constants

__all__ = [
    "Cache",
    "Config",
    "EncoderDecoder",
    "FeedForward",
    "MultiHeadAttention",
    "RelativeBias",
    "ResidualStack",
    "Trace",
    "Transformer",
    "activations",
    "causal_mask",
    "deepnorm_constants",
    "from_hf_bert",
    "from_hf_gpt2",
    "from_hf_t5",
    "padding_mask",
    "prefix_mask",
    "relative_bucket",
    "rotary",
    "sinusoids",
]
