"""Losses, metrics, tasks, checkpoints and the one `fit`; needs no Lightning until something is trained."""
