"""Progress bars that a person sees and a stored notebook does not."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")


def progress(iterable: Iterable[T], description: str = "", total: int | None = None) -> Iterable[T]:
    """Iterate with a tqdm bar in JupyterLab or a terminal; without one when nobody watches.

    A notebook that is executed unattended (nbclient, papermill, nbval) does not accept input; that is how
    it is recognised. The bar removes itself at the end.
    """
    from tqdm.auto import tqdm

    ipython = sys.modules.get("IPython")
    kernel = getattr(ipython.get_ipython(), "kernel", None) if ipython else None
    hidden = not kernel._allow_stdin if kernel is not None else None
    return tqdm(iterable, desc=description, total=total, leave=False, disable=hidden)
