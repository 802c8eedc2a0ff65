"""The routes of the page: the whole, the fragment that it swaps in, and its own few static files."""

from pathlib import Path
from urllib.parse import urlsplit

import jinja2
from fastapi import APIRouter
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, HTMLResponse

from producer.dashboard import words
from producer.dashboard.overview import read_overview
from producer.jobs.errors import Unavailable
from producer.jobs.store import Store

HERE = Path(__file__).parent
STATIC = frozenset({"dashboard.css", "dashboard.js", "icon.svg"})


def dashboard(store: Store, *, lease_s: float, api_path: str, image_origin: str) -> APIRouter:
    """The page at ``/``.

    ``api_path`` is where the API's own paths begin, to which the page links; a job's image there leads on to
    ``image_origin``, the only other server from which the page may load anything.
    """
    router = APIRouter(include_in_schema=False)
    templates = _templates(api_path)
    headers = _headers(image_origin)

    @router.get("/")
    def page() -> HTMLResponse:
        """The whole page. Without Postgres it says so, and goes on asking."""
        try:
            overview = read_overview(store, lease_s=lease_s)
        except Unavailable as error:
            return HTMLResponse(templates.get_template("page.html").render(away=error), 503, headers)
        return HTMLResponse(templates.get_template("page.html").render(overview=overview), headers=headers)

    @router.get("/overview")
    def fragment() -> HTMLResponse:
        """What the page swaps in. Raises: Unavailable."""
        overview = read_overview(store, lease_s=lease_s)
        return HTMLResponse(templates.get_template("overview.html").render(overview=overview), headers=headers)

    @router.get("/static/{name}")
    def static(name: str) -> FileResponse:
        if name not in STATIC:
            raise HTTPException(404)
        return FileResponse(HERE / "static" / name, headers={"Cache-Control": "no-cache"})

    return router


def _templates(api_path: str) -> jinja2.Environment:
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {
        "span": words.span,
        "ago": words.ago,
        "clock": words.clock,
        "number": words.number,
    }
    templates.globals["api"] = api_path
    return templates


def _headers(image_origin: str) -> dict[str, str]:
    """A page that shows strangers' text runs no code but its own, even if a template once forgot to escape."""
    parts = urlsplit(image_origin)
    policy = (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; base-uri 'none'; "
        f"form-action 'none'; frame-ancestors 'none'; img-src 'self' {parts.scheme}://{parts.netloc}"
    )
    return {
        "Content-Security-Policy": policy,
        "Cache-Control": "no-store",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }
