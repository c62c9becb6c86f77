"""`dualrestore serve`: run the daemon."""

import logging

import click

from dualrestore.cli.arguments import Invocation, config_option, json_option


class _JsonLines(logging.Formatter):
    """A log record as one JSON document."""

    def format(self, record: logging.LogRecord) -> str:
        import json

        document = {
            "time": record.created,
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            document["traceback"] = self.formatException(record.exc_info)
        return json.dumps(document)


def _start_log(*, as_json: bool) -> None:
    out = logging.StreamHandler()
    out.setFormatter(
        _JsonLines()
        if as_json
        else logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    )
    root = logging.getLogger()
    root.addHandler(out)
    root.setLevel(logging.INFO)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)


@click.command("serve")
@config_option
@json_option
@click.pass_obj
def command(invocation: Invocation) -> None:
    """Run the daemon of a configuration until SIGTERM or Ctrl-C; --json logs JSON lines.

    \b
    Example:
      dualrestore serve -c /etc/dualrestore.toml
    """
    from dualrestore.config import configured_path, load_configuration
    from dualrestore.servers.daemon import serve

    configuration = load_configuration(configured_path(invocation.config))
    _start_log(as_json=invocation.as_json)
    serve(configuration)
