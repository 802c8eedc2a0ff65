# Written by `make client` from producer/client/_async/__init__.py: change that one.
"""The client's one code path. ``make client`` writes ``_sync`` from it."""
