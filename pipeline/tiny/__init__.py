"""The small model that a laptop can run: Ovis-Image's own classes, built small, with weights from a fixed seed.

It exists so that every test and the demo take the path that the 7B model takes. It has learnt nothing: what it
draws means nothing, and still depends on every part of the request.
"""
