"""The client's one code path. ``make client`` writes ``_sync`` from it."""
