"""Replays recorded routing against placements: ``simulate`` on traces, scores from tokens."""
