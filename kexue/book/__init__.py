"""The machinery of the book: reading, storing, checking and rerunning chapters, and the site.

Nothing in here is imported by a chapter or by a topic module.
"""
