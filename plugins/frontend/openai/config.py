"""Settings of the ``openai`` frontend."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, SecretStr, field_validator

from drivetrain.contracts.plugin import PluginConfig

MIB = 1024 * 1024


def _check_secret(what: str, secret: SecretStr) -> None:
    text = secret.get_secret_value()
    if not text.strip():
        raise ValueError(f"{what} may not be empty")
    if text != text.strip():
        raise ValueError(f"{what} may not begin or end with a space: a header can't carry it, and nobody could get in")


class OpenAIConfig(PluginConfig):
    """Where the server listens, who may use it, and its limits."""

    host: str = Field("127.0.0.1", description="Address to listen on; 0.0.0.0 or :: listens on every interface.")
    port: int = Field(8000, ge=0, le=65535, description="TCP port; 0 takes any free one, and the address is printed.")
    api_key: SecretStr | tuple[SecretStr, ...] | None = Field(
        None,
        description="Key, or list of keys, of which one must come as `Authorization: Bearer KEY`. None asks for none. "
        "The pages at / and /docs and /health stay open.",
    )
    admin_token: SecretStr | None = Field(
        None,
        description="Token for POST /v1/admin/swap, sent as `Authorization: Bearer TOKEN`. None closes the path.",
    )
    served_names: tuple[str, ...] = Field(
        (), description="Name, or list of names, that requests may use beside the model's own."
    )
    max_body_bytes: int = Field(4 * MIB, ge=1024, description="Largest request body; a larger one is answered 413.")
    body_timeout_seconds: float = Field(
        60.0, gt=0, allow_inf_nan=False, description="Time for a body to arrive in full; after it, 408."
    )
    request_timeout_seconds: float | None = Field(
        600.0,
        gt=0,
        allow_inf_nan=False,
        description="Longest life of a request, and its limit when it names none; None sets no limit.",
    )
    drain_seconds: float = Field(
        30.0, ge=0, allow_inf_nan=False, description="Time that running requests get to finish after SIGTERM."
    )
    allow_origins: tuple[str, ...] = Field(
        (),
        description="Web origin, or list of them, whose pages may call the API from a browser (CORS); `*` allows all.",
    )
    chat_page: bool = Field(True, description="Serve the chat page at /.")
    log_level: Literal["critical", "error", "warning", "info", "debug"] = Field(
        "info", description="Least severe message that is logged to stderr; info includes one line a request."
    )

    @field_validator("served_names", "allow_origins", mode="before")
    @classmethod
    def _one_is_a_list_of_one(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @field_validator("api_key")
    @classmethod
    def _keys_hold_something(
        cls, value: SecretStr | tuple[SecretStr, ...] | None
    ) -> SecretStr | tuple[SecretStr, ...] | None:
        keys = value if isinstance(value, tuple) else () if value is None else (value,)
        if isinstance(value, tuple) and not keys:
            raise ValueError("an empty list of keys would lock everybody out; leave api_key out to ask for no key")
        for key in keys:
            _check_secret("a key", key)
        return value

    @field_validator("admin_token")
    @classmethod
    def _token_holds_something(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            _check_secret("the token", value)
        return value

    @property
    def admin(self) -> bytes | None:
        """The admin token as it comes over the wire."""
        return self.admin_token.get_secret_value().encode() if self.admin_token else None

    @property
    def keys(self) -> tuple[bytes, ...]:
        """The keys as they come over the wire; empty when none is asked for."""
        if self.api_key is None:
            return ()
        keys = self.api_key if isinstance(self.api_key, tuple) else (self.api_key,)
        return tuple(key.get_secret_value().encode() for key in keys)
