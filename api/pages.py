"""Pages for people: the start page, and Swagger UI from our own files, so that both work with no network at all."""

from importlib.resources import files
from pathlib import Path

from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse
from fastapi.staticfiles import StaticFiles

_STATIC = Path(str(files("api") / "static"))
_SWAGGER = "/static/swagger-ui"
_ONLY_US = {
    # The browser itself holds the page to our own files.
    "content-security-policy": "default-src 'none'; script-src 'self' 'unsafe-inline'; connect-src 'self';"
    " style-src 'self' 'unsafe-inline'; img-src 'self' data:; font-src 'self' data:; base-uri 'none';"
    " form-action 'self'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
}
_START = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>Nibble</title>
<link rel="icon" href="/static/swagger-ui/favicon-32x32.png">
</head>
<body>
<h1>Nibble</h1>
<p>Fine-tuning on your own machines, through OpenAI's API.</p>
<p>Every address is described, and can be tried, at <a href="/docs">/docs</a>. To use the official SDK, point its
<code>base_url</code> at <code>/v1</code> of this address.</p>
</body>
</html>
"""


def mount(app: FastAPI) -> None:
    """Add `/`, `/docs` and the files they need."""
    app.mount("/static", StaticFiles(directory=_STATIC), name="static")
    app.add_api_route("/", start_page, include_in_schema=False)
    app.add_api_route("/docs", swagger_ui, include_in_schema=False)


def start_page() -> HTMLResponse:
    """Say what this is and where its documentation is."""
    return HTMLResponse(_START, headers=_ONLY_US)


def swagger_ui() -> HTMLResponse:
    """Show the API's documentation, from which every call can be tried."""
    page = get_swagger_ui_html(
        openapi_url="/openapi.json",
        title="Nibble API",
        swagger_js_url=f"{_SWAGGER}/swagger-ui-bundle.js",
        swagger_css_url=f"{_SWAGGER}/swagger-ui.css",
        swagger_favicon_url=f"{_SWAGGER}/favicon-32x32.png",
        swagger_ui_parameters={"persistAuthorization": True, "validatorUrl": None},
    )
    page.headers.update(_ONLY_US)
    return page
