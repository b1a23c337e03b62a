"""Errors as answers: a status, and a body as OpenAI's clients read it."""

from typing import Any

from lora_jax.errors import UserError
from lora_jax.serve.driver import Closed, Full
from lora_jax.serve.folder import Missing

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}


class ApiError(Exception):
    """An error that ends a request with a status."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers: dict[str, str] = {}

    @property
    def body(self) -> dict[str, Any]:
        """The JSON of the answer."""
        kind = _TYPES.get(self.status, "server_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


def refused(field: str, why: str) -> ApiError:
    """Return the error of a field that is not supported, or has a value that is not."""
    return ApiError(400, f"{field}: {why}", param=field, code="unsupported_parameter")


def as_api_error(error: BaseException) -> ApiError:
    """Return the error that a client sees for any exception."""
    match error:
        case ApiError():
            return error
        case Missing():
            return ApiError(404, str(error), param="model", code="model_not_found")
        case Full():
            found = ApiError(429, str(error), code="queue_full")
            found.headers["retry-after"] = str(error.retry_after)
            return found
        case Closed():
            return ApiError(503, str(error), code="unavailable")
        case TimeoutError():
            return ApiError(503, "the request took longer than the server allows", code="timeout")
        case UserError():
            return ApiError(400, str(error))
    return ApiError(500, "internal error; the log of the server has the details")
