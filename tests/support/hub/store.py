"""What a Hub keeps: blobs by content, commits, branches, repositories, tokens. Knows nothing of HTTP."""

import fnmatch
import hashlib
import json
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime

LFS_PATTERNS = ("*.safetensors", "*.bin", "*.model", "*.pt", "*.onnx", "*.npz", "*.parquet", "*.zip", "*.h5")
LFS_BYTES = 10_000_000
"""Files of at least so many bytes are stored as LFS objects, whatever their names."""


class HubError(Exception):
    """An answer other than success: its status, `X-Error-Code` and `X-Error-Message`."""

    def __init__(self, status: int, message: str, code: str | None = None, **body):
        super().__init__(message)
        self.status, self.message, self.code, self.body = status, message, code, {"error": message} | body


@dataclass(frozen=True)
class Blob:
    """One file's content, and whether it is an LFS object."""

    content: bytes
    lfs: bool = False

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def oid(self) -> str:
        """As git names it: of the content, or of the pointer file that stands for an LFS object."""
        content = self.pointer if self.lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @property
    def pointer(self) -> bytes:
        lines = (
            "version https://git-lfs.github.com/spec/v1",
            f"oid sha256:{self.sha256}",
            f"size {len(self.content)}",
        )
        return "".join(f"{line}\n" for line in lines).encode()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid


@dataclass(frozen=True)
class Commit:
    """One revision: every file that it holds, by path."""

    oid: str
    parent: str | None
    title: str
    author: str
    files: dict[str, Blob]
    date: datetime = field(default_factory=lambda: datetime.now(UTC))


@dataclass
class Token:
    """Who may do what with it."""

    user: str
    role: str = "write"
    expired: bool = False


@dataclass
class Repository:
    """Branches, tags and pull requests of one model repository, and who may see it."""

    name: str
    private: bool = False
    gated: bool = False
    readers: set[str] = field(default_factory=set)
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    @property
    def owner(self) -> str:
        return self.name.partition("/")[0]

    def resolve(self, revision: str) -> Commit:
        """The commit of a branch, tag, pull request (`refs/pr/N`) or commit hash."""
        for name in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision):
            if name in self.refs:
                return self.commits[self.refs[name]]
        if revision in self.commits:
            return self.commits[revision]
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def ref(self, revision: str) -> str:
        """The full name of a branch or pull request that can be committed to."""
        name = revision if revision.startswith("refs/pr/") else f"refs/heads/{revision}"
        if name not in self.refs:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return name

    def history(self, revision: str) -> list[Commit]:
        """The newest first."""
        found = [self.resolve(revision)]
        while found[-1].parent is not None:
            found.append(self.commits[found[-1].parent])
        return found

    def commit(self, ref: str, title: str, author: str, files: dict[str, Blob]) -> Commit:
        """Makes one revision of these files and moves the branch or pull request to it."""
        parent = self.refs.get(ref)
        listed = {path: blob.oid for path, blob in sorted(files.items())}
        about = json.dumps([parent, title, author, listed, len(self.commits)])
        made = Commit(hashlib.sha1(about.encode()).hexdigest(), parent, title, author, dict(files))
        self.commits[made.oid] = made
        self.refs[ref] = made.oid
        return made

    def new_pull_request(self, of: str) -> str:
        """The ref of a pull request that begins at a revision."""
        number = 1 + sum(name.startswith("refs/pr/") for name in self.refs)
        self.refs[f"refs/pr/{number}"] = self.resolve(of).oid
        return f"refs/pr/{number}"


class Store:
    """All repositories, uploaded LFS objects and tokens of one server."""

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}  # by SHA-256: uploaded, committed or not
        self.parts: dict[str, dict[int, bytes]] = {}
        self.tokens: dict[str, Token] = {}

    def create(self, name: str, private: bool = False, author: str = "me") -> Repository:
        """As the Hub does, with one first commit that holds `.gitattributes`."""
        if name in self.repositories:
            raise HubError(409, "You already created this model repo", name=name)
        repo = self.repositories[name] = Repository(name, private)
        lines = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS)
        repo.commit("refs/heads/main", "initial commit", author, {".gitattributes": Blob(lines.encode())})
        return repo

    def who(self, header: str | None) -> Token | None:
        """
        The token of an `Authorization` header; None without one.

        Raises:
            HubError: 401 for one that is unknown or expired, for whatever it was sent.
        """
        if not header:
            return None
        token = self.tokens.get(header.removeprefix("Bearer ").strip())
        if token is None:
            raise HubError(401, "Invalid credentials in Authorization header")
        if token.expired:
            raise HubError(401, f'User Access Token "{token.user}" is expired')
        return token

    def readable(self, name: str, token: Token | None) -> Repository:
        """A repository whose existence and file list this token may see."""
        repo = self.repositories.get(name)
        if repo is None or (repo.private and (token is None or token.user not in {repo.owner, *repo.readers})):
            if token is None:  # the Hub does not tell strangers which of the two it is
                raise HubError(401, "Invalid username or password.", "RepoNotFound")
            raise HubError(404, "Repository not found", "RepoNotFound")
        return repo

    def downloadable(self, name: str, token: Token | None) -> Repository:
        """A repository whose files this token may download."""
        repo = self.readable(name, token)
        if repo.gated and (token is None or token.user not in {repo.owner, *repo.readers}):
            words = f"Access to model {name} is restricted and you are not in the authorized list."
            raise HubError(401 if token is None else 403, words, "GatedRepo")
        return repo

    def writable(self, name: str, token: Token | None) -> Repository:
        """A repository that this token may commit to."""
        repo = self.readable(name, token)
        if token is None:
            raise HubError(401, "Invalid username or password.")
        if token.role != "write" or token.user != repo.owner:
            words = "You don't have the rights to create a commit on this repo: the token needs the write role there."
            raise HubError(403, words)
        return repo

    def is_lfs(self, path: str, size: int, sample: bytes) -> bool:
        """Whether the Hub wants a file as an LFS object: by its name, its size, or because it is binary."""
        name = path.rpartition("/")[2]
        return any(fnmatch.fnmatch(name, p) for p in LFS_PATTERNS) or size >= LFS_BYTES or b"\0" in sample


def ignored(gitignore: str, path: str) -> bool:
    """Whether the plain patterns of a `.gitignore` name this path."""
    patterns = [line.strip() for line in gitignore.splitlines() if line.strip() and not line.startswith("#")]
    names = [path, *path.split("/")]
    return any(fnmatch.fnmatch(name, re.sub("^/|/$", "", pattern)) for pattern in patterns for name in names)
