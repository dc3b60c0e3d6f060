"""How good the answers are, with and without the user: metrics, protocols, baselines and reports.

Uses the engine and the store like any client of them; training uses only its metrics.
"""
