"""Self-contained HTML pages from the templates of this package."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

import jointkv


def render(template: str, **values: Any) -> str:
    """The page that `template`, a path below this package, makes of `values`; what it names must be there."""
    environment = Environment(
        loader=PackageLoader("jointkv.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(version=jointkv.__version__, **values)
