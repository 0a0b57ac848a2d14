"""Checks with power: claims tested against measurements, each shown to reject plausible wrong rivals.

>>> from kexue.verify import Ledger
>>> ledger = Ledger("linear-attention", seed=0)
"""

from kexue.verify.checks import Check, Rival, bound, equal, identity, mean, ordering, rounding, slope
from kexue.verify.ledger import CheckFailed, Ledger, RivalSurvived, table

__all__ = [
    "Check", "CheckFailed", "Ledger", "Rival", "RivalSurvived",
    "bound", "equal", "identity", "mean", "ordering", "rounding", "slope", "table",
]
