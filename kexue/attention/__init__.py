"""Attention: softmax, arbitrary similarities, the linear forms that never make the n x n matrix, synthetic logits.

Shapes are (..., n, d): any leading axes (batch, heads) are carried along and broadcast.
"""

from kexue.attention.linear import (
    FeatureMap,
    LinearAttentionState,
    cos,
    efficient_attention,
    elu1,
    feature_maps,
    linear_attention,
    relu,
    taylor2,
)
from kexue.attention.scale import attention_scale, softmax_entropy, sphere_entropy_rate, vmf_kl
from kexue.attention.softmax import attention, similarity_attention
from kexue.attention.synthesizer import (
    DenseLogits,
    DotLogits,
    FactorizedDenseLogits,
    FactorizedRandomLogits,
    LogitMixture,
    QueryLogits,
    RandomLogits,
    SynthesizerAttention,
    factor_logits,
)

__all__ = [
    "DenseLogits",
    "DotLogits",
    "FactorizedDenseLogits",
    "FactorizedRandomLogits",
    "FeatureMap",
    "LinearAttentionState",
    "LogitMixture",
    "QueryLogits",
    "RandomLogits",
    "SynthesizerAttention",
    "attention",
    "attention_scale",
    "cos",
    "efficient_attention",
    "elu1",
    "factor_logits",
    "feature_maps",
    "linear_attention",
    "relu",
    "similarity_attention",
    "softmax_entropy",
    "sphere_entropy_rate",
    "taylor2",
    "vmf_kl",
]
