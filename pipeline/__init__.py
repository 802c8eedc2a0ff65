"""What an image is and how it is drawn. Knows no queue, no table, no bucket.

Importing this package imports no torch: producers use ``pipeline.request`` too.
"""
