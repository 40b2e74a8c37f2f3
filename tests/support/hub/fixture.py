"""The fixture `hub`: a server on loopback that this process's `huggingface_hub` talks to, with a cache of its own."""

import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace

import huggingface_hub.hf_api
import pytest
from huggingface_hub import constants, file_download
from huggingface_hub.utils import _http, close_session

from knnmoe_hf.memory import hub_errors, upload
from tests.support.hub.server import HubServer


@pytest.fixture
def hub(tmp_path_factory, monkeypatch) -> Iterator[HubServer]:
    """
    Logged in as `me`, online, with an empty cache; the client waits a hundredth of its usual time between tries.

    The client reads its address, cache and mode from variables when it is imported, so they are replaced here one by
    one. `constants.HF_HUB_OFFLINE` may be set again by a test to go offline.
    """
    with HubServer() as server:
        home = tmp_path_factory.mktemp("hub-home")
        known = dict(ENDPOINT=server.endpoint, HF_HUB_OFFLINE=False, HF_HUB_DISABLE_XET=True, HF_HOME=str(home))
        known |= dict(HF_HUB_CACHE=str(home / "hub"), HUGGINGFACE_HUB_CACHE=str(home / "hub"))
        known |= dict(HF_TOKEN_PATH=str(home / "token"), HF_HUB_DISABLE_TELEMETRY=True)
        known["HUGGINGFACE_CO_URL_TEMPLATE"] = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        for name, value in known.items():
            monkeypatch.setattr(constants, name, value, raising=False)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.endpoint)
        if (transformers := sys.modules.get("transformers.utils.hub")) is not None:  # which keeps a client of its own
            monkeypatch.setattr(transformers, "_hf_api", None)
        monkeypatch.setenv("HF_TOKEN", server.token)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        hurried = vars(time) | {"sleep": lambda seconds: time.sleep(seconds / 100)}
        for module in (_http, file_download):
            monkeypatch.setattr(module, "time", SimpleNamespace(**hurried))
        monkeypatch.setattr(hub_errors, "sleep", hurried["sleep"])
        monkeypatch.setattr(upload, "sleep", hurried["sleep"])
        close_session()
        yield server
        close_session()
