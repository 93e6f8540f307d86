"""Weights that timm publishes, where no network is: told in seconds, with the reason."""

import re
import threading

import pytest

from engine.errors import UserError
from engine.weights import hub
from engine.weights.opening import open_weights


@pytest.mark.parametrize("why", ["cannot be reached (Name or service not known)", "does not answer within 0.1 seconds"])
def test_weights_that_cannot_be_fetched_are_one_line_in_seconds(why, monkeypatch):
    """Counted by the attempts: libraries would make six, with longer and longer waits between them."""
    attempts = []

    def connect(address: tuple[str, int], timeout: float):
        attempts.append(address)
        if "known" in why:
            raise OSError(-2, "Name or service not known")
        threading.Event().wait(5 * hub.SECONDS)
        raise TimeoutError

    monkeypatch.setattr(hub, "SECONDS", 0.1)
    monkeypatch.setattr(hub.socket, "create_connection", connect)
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub.constants, "ENDPOINT", "https://huggingface.co")
    monkeypatch.setattr(hub, "getproxies", dict)
    weights = open_weights("timm/test_vit")
    with pytest.raises(UserError, match=re.escape(f"huggingface.co {why}")) as caught:
        list(weights.read(list(weights.shapes)))
    assert "\n" not in str(caught.value)
    assert attempts == [("huggingface.co", 443)]

    monkeypatch.setattr(hub, "getproxies", lambda: {"https": "http://proxy.here:3128"})
    with pytest.raises(UserError, match=re.escape(f"proxy.here {why}")):
        list(weights.read(list(weights.shapes)))


# ---- what a run began with -------------------------------------------------------------------------------------------
