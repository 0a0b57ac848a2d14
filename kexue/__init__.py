"""kexue: verified building blocks from an executable companion to the blog 科学空间 (kexue.fm)."""

__version__ = "0.1.0"
