"""Whether weights that timm publishes can be fetched, told before libraries try for a minute."""

import socket
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from huggingface_hub import constants, try_to_load_from_cache

from engine.errors import reason

SECONDS = 3.0  # within which the host, or the proxy before it, must take a connection
FILES = ("model.safetensors", "pytorch_model.bin")  # in which timm looks for weights


def unreachable(config: Mapping[str, Any]) -> str | None:
    """Why weights of this `pretrained_cfg` cannot be fetched now; None where they are on this machine or may be."""
    hub, url = config.get("hf_hub_id"), config.get("url")
    if hub:
        name = config.get("hf_hub_filename")
        here = any(isinstance(try_to_load_from_cache(hub, file), str) for file in ([name] if name else FILES))
        url = None if here or constants.HF_HUB_OFFLINE else constants.ENDPOINT
    if not url:
        return None
    return _silence(*_first_hop(url))


def _first_hop(url: str) -> tuple[str, int]:
    """The proxy for a URL, or its own host."""
    target = urlsplit(url)
    proxies = getproxies()
    proxy = proxies.get(target.scheme) or proxies.get("all")
    if proxy and not proxy_bypass(target.hostname or ""):
        target = urlsplit(proxy if "//" in proxy else f"//{proxy}")
    return target.hostname or "", target.port or (80 if target.scheme == "http" else 443)


def _silence(host: str, port: int) -> str | None:
    """Why a host takes no connection; None where it does.

    Looking a name up knows no limit of time, so a thread does it, and is left alone if it takes too long.
    """
    answer: Future[str | None] = Future()

    def connect() -> None:
        try:
            socket.create_connection((host, port), timeout=SECONDS).close()
            answer.set_result(None)
        except (OSError, ValueError) as error:  # the second: of a name that no host can have
            answer.set_result(f"{host} cannot be reached ({reason(error)})")

    threading.Thread(target=connect, daemon=True).start()
    try:
        return answer.result(SECONDS)
    except TimeoutError:
        return f"{host} does not answer within {SECONDS:g} seconds"
