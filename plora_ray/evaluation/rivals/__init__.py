"""Baselines that are trained: what a sceptic would fit instead, on the same training rows, judged on the same test rows.

One family a file, each a `Rival`; `panel` fits those that were asked for and answers with them. Every rival meets the training rows
as often as the population stage does (training.epochs), with the same sizes of batches.
"""
