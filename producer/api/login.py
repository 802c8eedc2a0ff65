"""How a person with a browser gives the key: a form, and a cookie that only this server reads.

The cookie holds the key itself. It is sent to no other site and shown to no script; it ends with the browser's session,
and the key's own end is its end too.
"""

from typing import Any
from urllib.parse import parse_qs

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from starlette.responses import RedirectResponse

from producer.api.access import COOKIE, same_origin
from producer.api.bodies import media_type, read
from producer.api.errors import Forbidden, Unauthorized
from producer.api.problems import of_known
from producer.api.services import Here
from producer.dashboard import login_page
from producer.jobs.errors import Overloaded

FORM = "application/x-www-form-urlencoded"
FORM_MAX_BYTES = 2_000

router = APIRouter(include_in_schema=False)


@router.get("/login")
def form() -> Response:
    """The form."""
    return login_page()


@router.post("/login")
async def login(request: Request, here: Here) -> Response:
    """Keep the key in the browser, if it is one. Raises: Forbidden, TooLarge, WrongMediaType."""
    media_type(request, FORM)
    _own_page(request)
    fields = parse_qs((await read(request, FORM_MAX_BYTES)).decode(errors="replace"))
    key = fields.get("key", [""])[0].strip()
    try:
        await run_in_threadpool(here.access.holder, key)
    except (Unauthorized, Overloaded) as error:
        return login_page(str(error))
    answer = RedirectResponse("/", 303)
    answer.set_cookie(COOKIE, key, **_marks(request))
    return answer


@router.post("/logout")
def logout(request: Request) -> Response:
    """Forget the key in this browser; it goes on working elsewhere."""
    _own_page(request)
    answer = RedirectResponse("/login", 303)
    answer.delete_cookie(COOKIE, **_marks(request))
    return answer


def _own_page(request: Request) -> None:
    """Another site's page must not log anybody in or out. Raises: Forbidden."""
    if not same_origin(request.headers):
        raise Forbidden("this form is for this server's own page")


def _marks(request: Request) -> dict[str, Any]:
    return {"httponly": True, "samesite": "strict", "secure": request.url.scheme == "https"}


def install(app: FastAPI) -> None:
    """Lead a person who must say who they are to the form; programs are told by a problem document."""
    app.add_exception_handler(Unauthorized, _to_login)


def _to_login(request: Request, error: Exception) -> Response:
    reading_page = request.method == "GET" and "text/html" in request.headers.get("accept", "")
    answer = RedirectResponse("/login", 303) if reading_page else of_known(request, error)
    if COOKIE in request.cookies:
        answer.delete_cookie(COOKIE, **_marks(request))
    return answer
