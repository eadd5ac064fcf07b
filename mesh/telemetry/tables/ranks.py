"""The step loop of a rank, and migrations as each rank sees them."""

from __future__ import annotations

from expertmesh.mesh.telemetry.instruments import Counter, Histogram
from expertmesh.mesh.telemetry.tables.declared import (
    ATTENTION,
    EXPERT,
    RANKS,
    STEP_BUCKETS_S,
    TOKEN_COUNT_BUCKETS,
    Declared,
    Table,
)


class RankTable(Table):
    step_duration_seconds = Declared(
        Histogram,
        "expertmesh_step_duration_seconds",
        "A step with work, header to sampled tokens.",
        buckets=STEP_BUCKETS_S,
        unit="s",
        starts_on=RANKS,
    )
    step_tokens = Declared(
        Histogram,
        "expertmesh_step_tokens",
        "Tokens of this rank in a step.",
        buckets=TOKEN_COUNT_BUCKETS,
        unit="{token}",
        starts_on=ATTENTION,
    )
    header_wait_seconds = Declared(
        Histogram,
        "expertmesh_header_wait_seconds",
        "Waiting for the other ranks' headers before a step.",
        buckets=STEP_BUCKETS_S,
        unit="s",
        starts_on=RANKS,
    )
    attention_compute_duration_seconds = Declared(
        Histogram,
        "expertmesh_attention_compute_duration_seconds",
        "Dense work between two exchanges.",
        buckets=STEP_BUCKETS_S,
        unit="s",
        starts_on=ATTENTION,
    )
    dispatch_duration_seconds = Declared(
        Histogram,
        "expertmesh_dispatch_duration_seconds",
        "The dispatch of one layer.",
        buckets=STEP_BUCKETS_S,
        unit="s",
        starts_on=RANKS,
    )
    expert_compute_duration_seconds = Declared(
        Histogram,
        "expertmesh_expert_compute_duration_seconds",
        "The expert MLPs of one layer.",
        buckets=STEP_BUCKETS_S,
        unit="s",
        starts_on=EXPERT,
    )
    combine_duration_seconds = Declared(
        Histogram,
        "expertmesh_combine_duration_seconds",
        "The combine of one layer.",
        buckets=STEP_BUCKETS_S,
        unit="s",
        starts_on=RANKS,
    )
    split_steps = Declared(
        Counter, "expertmesh_split_steps", "Steps computed as two micro-batches that take turns.", starts_on=RANKS
    )
    expert_rank_tokens = Declared(
        Counter,
        "expertmesh_expert_rank_tokens",
        "Rows that this rank's experts computed, over all layers.",
        unit="{token}",
        starts_on=EXPERT,
    )
    slots_loaded = Declared(Counter, "expertmesh_slots_loaded", "Slots filled with an expert.", starts_on=EXPERT)
    checkpoint_read_bytes = Declared(
        Counter, "expertmesh_checkpoint_read_bytes", "Weights read from the checkpoint.", unit="By", starts_on=RANKS
    )

    # Migration, as each rank sees it.
    rank_migrations = Declared(
        Counter,
        "expertmesh_rank_migrations",
        "Plans that ended on this rank: committed, aborted, failed, refused, forgotten, superseded, view_ended.",
        labels=("outcome",),
        starts_on=RANKS,
        series=(("committed",), ("aborted",), ("failed",)),
    )
    rank_migration_duration_seconds = Declared(
        Histogram,
        "expertmesh_rank_migration_duration_seconds",
        "Phases of a migration on this rank: stage (in the background), switch (between two steps).",
        labels=("phase",),
        buckets=STEP_BUCKETS_S,
        unit="s",
        starts_on=RANKS,
        series=(("stage",), ("switch",)),
    )
    migrated_slots = Declared(
        Counter,
        "expertmesh_migrated_slots",
        "Slots that were switched to another expert, by where its weights came from: local, peer, checkpoint.",
        labels=("source",),
        starts_on=EXPERT,
        series=(("local",), ("peer",), ("checkpoint",)),
    )
    migrated_bytes = Declared(
        Counter, "expertmesh_migrated_bytes", "Weights that were switched to.", unit="By", starts_on=EXPERT
    )
    migration_peer_bytes = Declared(
        Counter,
        "expertmesh_migration_peer_bytes",
        "Weights that came from other ranks, by how they travelled: tcp, nixl.",
        labels=("transport",),
        unit="By",
        starts_on=EXPERT,
        series=(("tcp",), ("nixl",)),
    )
    migration_peer_seconds = Declared(
        Counter,
        "expertmesh_migration_peer_seconds",
        "For how long, from the first byte of each expert to its last; several may travel at a time.",
        labels=("transport",),
        unit="s",
        starts_on=EXPERT,
        series=(("tcp",), ("nixl",)),
    )
    migration_fallbacks = Declared(
        Counter,
        "expertmesh_migration_fallbacks",
        "Weights from the checkpoint instead of a peer: called_off, broken, checksum.",
        labels=("cause",),
        starts_on=EXPERT,
        series=(("called_off",), ("broken",), ("checksum",)),
    )
