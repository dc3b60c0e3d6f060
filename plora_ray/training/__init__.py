"""Training: the population stage, the user stage in waves, and the job that runs both on a Ray cluster and publishes.

DeepSpeed stands behind engine.py, Ray Train behind job.py; everything else is plain torch over one rank's rows.
"""
