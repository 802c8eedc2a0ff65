"""OpenAI's Batch, Files, Images and Models under ``/v1``, on the jobs and batches that the native API has.

The shapes are those that the ``openai`` package reads, version 3.54 (its ``types/``). Nothing has a table of its own
but uploaded files: a batch that was made here is a batch there and on the page, and every batch there is one here, with
an input file that is written from its rows when it is read. Output and error files are always so written.
"""
