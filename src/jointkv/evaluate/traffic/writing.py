"""Requests of a traffic as lines of JSON, in the form of OpenAI's batch API with the times of a log beside it."""

from __future__ import annotations

from typing import Any

from jointkv.evaluate.traffic.base import Request


def as_row(request: Request, number: int, model: str, output_tokens: int) -> dict[str, Any]:
    """What `jointkv` reads as a log, `vllm run-batch` as a batch, and others as a body to send.

    Args:
        number: of the request, from 0.
        model: the name that the server knows it by.
        output_tokens: that are to be generated.
    """
    body: dict[str, Any] = {"model": model, "max_tokens": output_tokens}
    course, row = request.course, dict[str, Any]()
    if course is None:
        path, body["prompt"] = "/v1/completions", request.text
    else:
        path = "/v1/chat/completions"
        body["messages"] = [{"role": role, "content": content} for role, content in course.messages]
        body["cache_salt"] = course.tenant
        row = {"session_id": course.session, "timestamp": round(course.seconds, 3)}
    return {"custom_id": f"request-{number}", "method": "POST", "url": path, **row, "body": body}
