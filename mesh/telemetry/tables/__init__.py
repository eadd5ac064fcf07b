"""Metrics by what they are about."""
