"""What a server is besides its model."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Settings:
    name: str
    """What the model is called."""
    temperature: float = 0.0
    """Of requests that name none."""
    api_key: str | None = None
    hosts: tuple[str, ...] = ()
    """The names that requests may call this server by; none: any."""
    rate_limit: int = 0
    """Completions a minute from one address; 0: any number."""
    body_limit: int = 2**20
    """Bytes of a request."""
