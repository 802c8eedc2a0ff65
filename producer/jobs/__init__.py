"""The language both sides speak: states, tables, statements, messages, keys.

The one part of producer that a worker sees.
"""
