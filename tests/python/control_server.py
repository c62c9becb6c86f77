"""The control API of two small volumes on a port of the loopback, for a fuzzer of HTTP:
`python -m tests.python.control_server PORT SCHEMA`.

Guarantees: writes below a directory of its own only (Landlock), whatever it is told; it ends with
SIGTERM. The schema is written before it listens.
"""

import json
import sys
import tempfile
from pathlib import Path

import uvicorn

from dualrestore.core import confine_writing
from tests.python.control_schema import openapi
from tests.python.test_fuzz_control import Asked


def main() -> None:
    """Serves until it is ended."""
    port, schema = int(sys.argv[1]), Path(sys.argv[2])
    with tempfile.TemporaryDirectory() as place:
        confine_writing([place, str(schema.parent)])
        asked = Asked(Path(place))
        document = openapi(asked.application, Path(place), ["v", "far"])
        schema.write_text(json.dumps(document))
        uvicorn.run(asked.application, host="127.0.0.1", port=port, log_level="error")
        asked.close()


if __name__ == "__main__":
    main()
