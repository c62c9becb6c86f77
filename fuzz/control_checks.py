"""What schemathesis asks of each answer of the control API (`fuzz/control`)."""

import schemathesis


@schemathesis.check
def answered_in_words(ctx: object, response: object, case: object) -> None:  # noqa: ARG001
    """A failure is told as the API promises, and was foreseen."""
    if response.status_code >= 500:  # type: ignore[attr-defined]
        error = response.json()["error"]  # type: ignore[attr-defined]
        assert error["message"].strip(), "an error without words"
        assert not error["message"].startswith("unexpected "), error["message"]
