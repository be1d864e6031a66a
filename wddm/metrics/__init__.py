"""Metrics: how far generated images are from real ones, with intervals."""
