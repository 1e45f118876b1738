"""The ASGI application: routes over one `Service`."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from ringspan import __version__
from ringspan.deploy.serve import contexts, routes
from ringspan.deploy.serve.errors import MISSING, ApiError, on_exception, on_http_exception
from ringspan.deploy.serve.limits import HeaderLimits
from ringspan.deploy.serve.openapi import describe
from ringspan.deploy.serve.state import ServeState
from ringspan.errors import RingspanError

PAGE = Path(__file__).parent / "page"
PAGE_FILES = {"/": "index.html"} | {
    f"/{name}": name for name in ("page.js", "page.css", "icon.svg")
}
PAGE_HEADERS = {
    "content-security-policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def build_app(state: ServeState, closing: Callable[[], None] = lambda: None) -> Starlette:
    """closing: called when the server has answered its last request."""

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        try:
            yield
        finally:
            state.texts.close()
            closing()

    description = describe(__version__)

    async def openapi(request: Request) -> Response:
        return JSONResponse(description)

    app = Starlette(
        routes=[
            Route("/v1/chat/completions", routes.chat, methods=["POST"]),
            Route("/v1/completions", routes.completions, methods=["POST"]),
            Route("/v1/models", routes.models),
            Route("/v1/models/{name:path}", routes.model),
            _by_method("/v1/contexts", GET=contexts.list_, POST=contexts.make),
            _by_method("/v1/contexts/{id}", GET=contexts.show, DELETE=contexts.remove),
            Route("/v1/contexts/{id}/verify", contexts.verify, methods=["POST"]),
            Route("/v1/requests", routes.request_views),
            Route("/v1/requests/{id}", routes.request_view),
            Route("/tokenize", routes.tokenize, methods=["POST"]),
            Route("/health", routes.health),
            Route("/metrics", routes.metrics),
            Route("/openapi.json", openapi),
            *(Route(path, _page(PAGE / name)) for path, name in PAGE_FILES.items()),
        ],
        middleware=[Middleware(HeaderLimits, limits=state.limits)],
        exception_handlers={
            HTTPException: on_http_exception,
            ApiError: on_exception,
            RingspanError: on_exception,
            Exception: on_exception,
        },
        lifespan=lifespan,
    )
    app.state.serve = state
    return app


def _by_method(path: str, **handlers: Callable[[Request], Awaitable[Response]]) -> Route:
    """One route for all methods of a path: of several, a 405's `Allow` would name the first's."""

    async def handle(request: Request) -> Response:
        method = "GET" if request.method == "HEAD" else request.method
        return await handlers[method](request)

    return Route(path, handle, methods=list(handlers))


def _page(file: Path) -> Callable[[Request], object]:
    """One of the page's fixed files; its name comes from no request."""

    async def show(request: Request) -> Response:
        if not file.is_file():
            raise ApiError(404, "this server has no page", kind=MISSING, code="unknown_route")
        return FileResponse(file, headers=PAGE_HEADERS)

    return show
