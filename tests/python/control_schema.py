"""The control API as OpenAPI, made of its routes and of what their bodies may be.

Guarantees: every route that answers at once is in it; a route whose body is not known here takes
any object. Paths that the daemon would write to lie below one directory.
"""

import re
from pathlib import Path
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.routing import Route

from dualrestore.servers import control

BODIES: dict[str, type[msgspec.Struct]] = {
    "/restore": control.Restore,
    "/hydrate": control.Hydrate,
    "/snapshot": control.Snapshot,
    "/merge": control.Merge,
    "/attach": control.Attach,
    "/detach": control.Detach,
    "/verify": control.Verify,
    "/bundle": control.MakeBundle,
}
ENDLESS = {"/events"}
"""What answers as long as it is listened to."""
_WRITTEN_OR_READ = {"media", "sources", "bundles", "bundle"}


def operations(application: Starlette) -> list[tuple[str, str, type[msgspec.Struct] | None]]:
    """Method, path and body of every route."""
    found = []
    for route in application.routes:
        assert isinstance(route, Route)
        for method in sorted((route.methods or set()) - {"HEAD"}):
            if route.path not in ENDLESS:
                tail = re.sub(r"^.*}", "", route.path)
                found.append((method, route.path, BODIES.get(tail) if method == "POST" else None))
    return found


def _confine(schema: Any, place: Path) -> None:
    """Strings that are paths lie below `place`, in all that is below `schema`."""
    if isinstance(schema, dict):
        for name, inside in schema.get("properties", {}).items():
            if name in _WRITTEN_OR_READ:
                pattern = {"pattern": f"^{re.escape(str(place))}/[a-z.]{{1,8}}$"}
                inside.get("items", inside).update(pattern)
        for inside in schema.values():
            _confine(inside, place)
    elif isinstance(schema, list):
        for inside in schema:
            _confine(inside, place)


def openapi(application: Starlette, place: Path, volumes: list[str]) -> dict[str, Any]:
    """The whole document. `volumes` are names to ask for, beside others."""
    template = "#/components/schemas/{name}"
    kinds = sorted(BODIES.values(), key=lambda kind: kind.__name__)
    _, components = msgspec.json.schema_components(kinds, ref_template=template)
    _confine(components, place)
    paths: dict[str, dict[str, Any]] = {}
    for method, path, body in operations(application):
        parameters = [
            {
                "name": name,
                "in": "path",
                "required": True,
                "schema": {"anyOf": [{"enum": volumes}, {"type": "string", "minLength": 1}]},
            }
            for name in re.findall(r"{(\w+)}", path)
        ]
        operation: dict[str, Any] = {
            "parameters": parameters,
            "responses": {"200": {"description": "done"}, "4XX": {"description": "refused"}},
        }
        if method in {"POST", "PATCH", "PUT"}:
            schema = {"type": "object"}
            if body is not None:
                schema = {"$ref": template.format(name=body.__name__)}
            content = {"application/json": {"schema": schema}}
            operation["requestBody"] = {"required": True, "content": content}
        paths.setdefault(path, {})[method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {"title": "dualrestore", "version": "1"},
        "paths": paths,
        "components": {"schemas": components},
    }
