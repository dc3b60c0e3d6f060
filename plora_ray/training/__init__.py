"""Training: the population stage, the user stage in waves, and the job that runs both on a Ray cluster and publishes.

DeepSpeed stands behind engine.py, Ray Train behind job.py. board.py carries what ranks tell to the driver, where watcher.py hands it on
to telemetry/; everything else is plain torch over one rank's rows.
"""
