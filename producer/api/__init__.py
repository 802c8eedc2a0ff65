"""The HTTP door: the native API under ``/api/v1``, health, metrics and the page.

It validates, submits and reads; it never draws and never reaches torch. The prefix ``/v1`` is kept free.
"""

from producer.api.app import create_app
from producer.api.server import serve

__all__ = ["create_app", "serve"]
