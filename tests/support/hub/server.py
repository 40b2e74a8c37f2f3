"""`HubServer`: a Hub on loopback."""

import re
import tempfile
import threading
from http.server import ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

from tests.support.hub.api import Api
from tests.support.hub.faults import Faults
from tests.support.hub.files import Files
from tests.support.hub.http import Answer, Handler, Request
from tests.support.hub.store import Blob, Commit, HubError, Repository, Store, Token

_MODEL = r"/api/models/(?P<repo>[^/]+/[^/]+?)"


class HubServer:
    """
    A Hub that the real `huggingface_hub` client talks to over HTTP; nothing leaves this machine.

    Attributes:
        endpoint: its address, for `HF_ENDPOINT`.
        token: of the user `me`, who may write to repositories `me/...`.
        read_only_token: of `me`, who may not write with it.
        expired_token: of `me`; the Hub accepts it no more.
        stranger_token: of the user `stranger`.
        faults: what goes wrong (`Faults`); nothing at first.
        requests: `"METHOD /path"` of every request that was served, the oldest first.
        store: repositories, LFS objects (`store.objects`, by SHA-256) and tokens.
        part_size: files of more bytes are uploaded in several parts.
        page_size: entries of a file list that one answer holds.
    """

    def __init__(self, part_size: int = 16 << 20, page_size: int = 1000):
        self.store, self.faults, self.requests = Store(), Faults(), []
        self._lock = threading.RLock()
        self.part_size, self.page_size = part_size, page_size
        self.token, self.read_only_token = self.new_token("me"), self.new_token("me", role="read")
        self.expired_token = self.new_token("me", expired=True)
        self.stranger_token = self.new_token("stranger")

    def __enter__(self) -> "HubServer":
        self._servers = [_Server(("127.0.0.1", 0), Handler) for _ in range(2)]
        self.endpoint, storage = (f"http://127.0.0.1:{server.server_port}" for server in self._servers)
        api = Api(self)
        files = Files(self, storage)
        self._routes = [(re.compile(f"{route}/?"), answer) for route, answer in _routes(api, files)]
        self._home = tempfile.TemporaryDirectory(prefix="hub-home-")
        for server in self._servers:
            server.hub = self
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()
        self._home.cleanup()

    @property
    def environment(self) -> dict[str, str]:
        """Variables for a subprocess that talks to this server: add them to `os.environ`."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_TOKEN": self.token,
            "HF_HOME": self._home.name,
            "HF_HUB_CACHE": str(Path(self._home.name) / "hub"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }

    def new_token(self, user: str, role: str = "write", expired: bool = False) -> str:
        """A token of a user; `role` is `"read"` or `"write"`."""
        name = f"hf_{user}{role}{len(self.store.tokens)}"
        self.store.tokens[name] = Token(user, role, expired)
        return name

    def expire(self, token: str | None = None) -> None:
        """From now on the token (by default `self.token`) is not accepted."""
        self.store.tokens[token or self.token].expired = True

    def repository(self, repo: str) -> Repository:
        """A repository, whose attributes `private`, `gated` and `readers` may be changed."""
        return self.store.repositories[repo]

    def create(
        self, repo: str, private: bool = False, gated: bool = False, readers: tuple[str, ...] = ()
    ) -> Repository:
        """Makes a repository without a client."""
        made = self.store.create(repo, private, repo.partition("/")[0])
        made.gated, made.readers = gated, set(readers)
        return made

    def commits(self, repo: str, revision: str = "main") -> list[Commit]:
        """Of a branch, tag, pull request (`refs/pr/1`) or commit, the newest first; the last one is the Hub's own."""
        with self._lock:
            return self.repository(repo).history(revision)

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """`{path: content}` of a revision, without `.gitattributes`."""
        with self._lock:
            files = self.repository(repo).resolve(revision).files
        return {path: blob.content for path, blob in files.items() if path != ".gitattributes"}

    def commit(
        self, repo: str, changes: dict[str, bytes | str | None], revision: str = "main", title: str = "by hand"
    ) -> Commit:
        """One commit of somebody else: contents of files by path; None deletes one. The branch is made if need be."""
        with self._lock:
            of, ref = self.repository(repo), f"refs/heads/{revision}"
            of.refs.setdefault(ref, of.refs["refs/heads/main"])
            files = dict(of.resolve(revision).files)
            for path, content in changes.items():
                files.pop(path, None)
                if content is not None:
                    content = content.encode() if isinstance(content, str) else content
                    files[path] = Blob(content, self.store.is_lfs(path, len(content), content[:512]))
                    self.store.objects |= {files[path].sha256: content} if files[path].lfs else {}
            return of.commit(ref, title, of.owner, files)

    def commit_folder(self, repo: str, folder: Path, path_in_repo: str = "", revision: str = "main") -> Commit:
        """One commit of a local folder's files, for instance a base model's."""
        names = [path for path in sorted(Path(folder).rglob("*")) if path.is_file()]
        prefix = f"{path_in_repo}/" if path_in_repo else ""
        changes = {prefix + path.relative_to(folder).as_posix(): path.read_bytes() for path in names}
        return self.commit(repo, changes, revision)

    def serve(self, request: Request, quoted: str) -> Answer:
        """Answers one request; `quoted` is its path as it was sent, where a revision may hold a quoted `/`."""
        try:
            for route, answer in self._routes:
                if (found := route.fullmatch(f"{request.method} {quoted}")) is not None:
                    request.words = {k: unquote(v) for k, v in found.groupdict().items() if v is not None}
                    with self._lock:
                        request.token = self._token(request)
                        return answer(request)
            raise HubError(404, f"no such address: {request.method} {quoted}")
        except HubError as error:
            return Answer.of_error(error)

    def _token(self, request: Request) -> Token | None:
        header = request.headers.get("Authorization")
        if not re.match("/(cdn|lfs/(object|part))/", request.path):
            return self.store.who(header)
        if header:  # signed addresses: whoever sends a token there gives it away
            raise HubError(400, "only one way of authentication is allowed: this address is signed")
        return None


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request, client_address) -> None:
        """A client that was killed is no error of the server; whatever else is, is shown."""
        import sys

        if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)


def _routes(api: Api, files: Files) -> list[tuple]:
    """`(regular expression of "METHOD /path", answer)`, the first that matches; revisions hold no unquoted `/`."""
    read, rev = "(GET|HEAD) ", r"(?P<revision>[^/]+)"
    return [
        ("GET /api/whoami-v2", api.whoami),
        ("POST /api/validate-yaml", api.validate_yaml),
        ("POST /api/repos/create", api.create),
        ("DELETE /api/repos/delete", api.delete),
        (f"GET {_MODEL}/auth-check", api.auth_check),
        (f"GET {_MODEL}/auth-check/write", api.auth_check_write),
        (f"PUT {_MODEL}/settings", api.settings),
        (f"GET {_MODEL}/refs", api.refs),
        (f"GET {_MODEL}/commits/{rev}", api.commits),
        (f"POST {_MODEL}/branch/(?P<branch>[^/]+)", api.create_branch),
        (f"DELETE {_MODEL}/branch/(?P<branch>[^/]+)", api.delete_branch),
        (f"POST {_MODEL}/tag/{rev}", api.create_tag),
        (f"POST {_MODEL}/discussions/(?P<number>[0-9]+)/merge", api.merge),
        (f"GET {_MODEL}/tree/{rev}(/(?P<path>.+?))?", api.tree),
        (f"POST {_MODEL}/paths-info/{rev}", api.paths_info),
        (f"POST {_MODEL}/preupload/{rev}", api.preupload),
        (f"POST {_MODEL}/commit/{rev}", api.commit),
        (f"GET {_MODEL}/revision/{rev}", api.info),
        ("GET /api/models/(?P<repo>[^/]+(/[^/]+)?)", api.info),
        (r"POST /(?P<repo>[^/]+/[^/]+?)\.git/info/lfs/objects/batch", files.batch),
        (r"POST /(?P<repo>[^/]+/[^/]+?)\.git/info/lfs/verify", files.verify),
        ("PUT /lfs/object/(?P<oid>[0-9a-f]{64})", files.put_object),
        ("PUT /lfs/part/(?P<oid>[0-9a-f]{64})/(?P<number>[0-9]+)", files.put_part),
        ("POST /lfs/complete/(?P<oid>[0-9a-f]{64})", files.complete),
        (f"{read}/cdn/(?P<oid>[0-9a-f]{{64}})", files.cdn),
        (f"{read}/(?P<repo>[^/]+(/[^/]+)?)/resolve/{rev}/(?P<path>.+)", files.resolve),
    ]
