"""The routes of the page: the whole, the fragment that it swaps in, and its own few static files."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import jinja2
from fastapi import APIRouter, Depends
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, HTMLResponse

from producer.dashboard import words
from producer.dashboard.overview import read_overview
from producer.jobs.errors import Unavailable
from producer.jobs.store import Store
from producer.manifest import size_sets

HERE = Path(__file__).parent
STATIC = frozenset({"dashboard.css", "dashboard.js", "submit.js", "icon.svg"})


@dataclass(frozen=True)
class Viewer:
    """A person before the page: what they see of the farm, and on whose behalf if they had to say so."""

    store: Store
    tenant: str | None


def dashboard(view: Callable[..., Any], *, lease_s: float, api_path: str, image_origin: str) -> APIRouter:
    """The page at ``/``.

    ``view`` is the dependency that finds a request's ``Viewer``. ``api_path`` is where the API's own paths begin, to
    which the page links; a job's image there leads on to ``image_origin``, the only other server from which the page
    may load anything.
    """
    router = APIRouter(include_in_schema=False)
    templates = _templates(api_path)
    headers = _headers(image_origin)

    @router.get("/")
    def page(viewer: Annotated[Viewer, Depends(view)]) -> HTMLResponse:
        """The whole page. Without Postgres it says so, and goes on asking."""
        template = templates.get_template("page.html")
        try:
            overview = read_overview(viewer.store, lease_s=lease_s)
        except Unavailable as error:
            return HTMLResponse(template.render(away=error, viewer=viewer), 503, headers)
        return HTMLResponse(template.render(overview=overview, viewer=viewer), headers=headers)

    @router.get("/overview")
    def fragment(viewer: Annotated[Viewer, Depends(view)]) -> HTMLResponse:
        """What the page swaps in. Raises: Unavailable."""
        overview = read_overview(viewer.store, lease_s=lease_s)
        return HTMLResponse(templates.get_template("overview.html").render(overview=overview), headers=headers)

    @router.get("/submit")
    def handing_in(viewer: Annotated[Viewer, Depends(view)]) -> HTMLResponse:
        """Where a spreadsheet is handed in. The page's own script sends it to the API."""
        sizes = [(name, *size) for named in size_sets().values() for name, size in named.items()]
        body = templates.get_template("submit.html").render(viewer=viewer, sizes=sizes)
        return HTMLResponse(body, headers=headers)

    @router.get("/static/{name}")
    def static(name: str) -> FileResponse:
        if name not in STATIC:
            raise HTTPException(404)
        return FileResponse(HERE / "static" / name, headers={"Cache-Control": "no-cache"})

    return router


def login_page(wrong: str | None = None) -> HTMLResponse:
    """The form that asks for a key; ``wrong`` says what is wrong with the one that was given."""
    body = _templates("").get_template("login.html").render(wrong=wrong)
    return HTMLResponse(body, 401 if wrong else 200, _headers())


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


def _headers(image_origin: str | None = None) -> dict[str, str]:
    """A page that shows strangers' text runs no code but its own, even if a template once forgot to escape."""
    parts = urlsplit(image_origin or "")
    images = f"'self' {parts.scheme}://{parts.netloc}" if image_origin else "'self'"
    policy = (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; base-uri 'none'; "
        f"form-action 'self'; frame-ancestors 'none'; img-src {images}"
    )
    return {
        "Content-Security-Policy": policy,
        "Cache-Control": "no-store",
        "Referrer-Policy": "same-origin",  # with none at all, the page's own forms would come from nowhere
        "X-Content-Type-Options": "nosniff",
    }
