"""Decoding: one `decode` for any model and strategy, truncation, prefix trees, and what makes a decoder stop."""

from kexue.decoding.chains import expected_length, fundamental_matrix, repetition_index, survival, termination_probability
from kexue.decoding.search import Allowed, Decoded, Step, decode
from kexue.decoding.termination import SelfTerminatingHead, eos_floor, greedy_limit, mean_length_limit
from kexue.decoding.truncation import PrefixTrie, truncate

__all__ = [
    "Allowed",
    "Decoded",
    "PrefixTrie",
    "SelfTerminatingHead",
    "Step",
    "decode",
    "eos_floor",
    "expected_length",
    "fundamental_matrix",
    "greedy_limit",
    "mean_length_limit",
    "repetition_index",
    "survival",
    "termination_probability",
    "truncate",
]
