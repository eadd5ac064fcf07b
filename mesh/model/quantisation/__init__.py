"""Weights that a checkpoint stores in fewer bits: what is recognised, and what it means."""
