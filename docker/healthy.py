"""Exits with 0 if the URL that is given answers 200 within three seconds: the images' health check, without curl.

``http.client`` knows no proxy, so a proxy in the container's environment cannot stand between it and its own port.
"""

import http.client
import sys
from urllib.parse import urlsplit

url = urlsplit(sys.argv[1])
connection = http.client.HTTPConnection(url.hostname or "127.0.0.1", url.port, timeout=3)
try:
    connection.request("GET", url.path or "/")
    status = connection.getresponse().status
except OSError as error:
    sys.exit(f"{sys.argv[1]}: {error}")
sys.exit(0 if status == http.client.OK else f"{sys.argv[1]}: {status}")
