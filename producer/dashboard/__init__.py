"""The farm at a glance: one page that is drawn on the server and refreshes itself.

It reads the store and changes nothing. Everything it needs comes from this process, so it works without the Internet.
"""

from producer.dashboard.page import Viewer, dashboard, login_page

__all__ = ["Viewer", "dashboard", "login_page"]
