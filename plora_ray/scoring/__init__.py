"""Answers for every row of a table, each by its own user's adapter, without HTTP: `plora predict`.

`job.py` spreads the table over a Ray cluster and goes on where it stopped; `parts.py` is what one process does with one unit of it.
"""
