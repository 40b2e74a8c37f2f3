"""The endpoints under `/api`: who one is, repositories, revisions, trees, commits."""

import base64
import json
import posixpath
import re
from urllib.parse import parse_qs

import yaml

from tests.support.hub.http import Answer, Request
from tests.support.hub.store import Blob, Commit, HubError, Repository, ignored


class Api:
    """The endpoints of one server; every method answers one of the routes in `server.py`."""

    def __init__(self, hub):
        self.hub, self.store, self.endpoint = hub, hub.store, hub.endpoint

    # who one is

    def whoami(self, request: Request) -> Answer:
        token = request.token
        if token is None:
            raise HubError(401, "Invalid username or password.")
        about = {"accessToken": {"displayName": "loopback", "role": token.role}}
        return Answer.of({"type": "user", "name": token.user, "fullname": token.user, "orgs": [], "auth": about})

    def auth_check(self, request: Request) -> Answer:
        self.store.downloadable(request.words["repo"], request.token)
        return Answer.of({})

    def auth_check_write(self, request: Request) -> Answer:
        self.store.writable(request.words["repo"], request.token)
        return Answer.of({})

    def validate_yaml(self, request: Request) -> Answer:
        errors, warnings = _card_faults(request.json()["content"])
        return Answer.of({"errors": errors, "warnings": warnings}, 400 if errors else 200)

    # repositories

    def create(self, request: Request) -> Answer:
        token, content = request.token, request.json()
        if token is None:
            raise HubError(401, "Invalid username or password.")
        owner = content.get("organization") or token.user
        name = f"{owner}/{content['name']}"
        url = {"url": f"{self.endpoint}/{name}", "name": name}
        if token.role != "write" or owner != token.user:
            raise HubError(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')
        if name in self.store.repositories:
            raise HubError(409, "You already created this model repo", **url)
        self.store.create(name, content.get("visibility") == "private" or bool(content.get("private")), token.user)
        return Answer.of(url)

    def delete(self, request: Request) -> Answer:
        content = request.json()
        name = f"{content.get('organization') or request.token.user}/{content['name']}"
        del self.store.repositories[self.store.writable(name, request.token).name]
        return Answer.of({})

    def settings(self, request: Request) -> Answer:
        repo, content = self.store.writable(request.words["repo"], request.token), request.json()
        if "visibility" in content or "private" in content:
            repo.private = content.get("visibility") == "private" or bool(content.get("private"))
        repo.gated = bool(content.get("gated", repo.gated))
        return Answer.of({"private": repo.private, "gated": repo.gated})

    def info(self, request: Request) -> Answer:
        repo = self.store.readable(request.words["repo"], request.token)
        commit = repo.resolve(request.words.get("revision") or "main")
        about = {"_id": repo.name, "id": repo.name, "modelId": repo.name, "author": repo.owner, "sha": commit.oid}
        about |= {"private": repo.private, "gated": "manual" if repo.gated else False, "disabled": False}
        about |= {"lastModified": _date(commit), "createdAt": _date(repo.history(commit.oid)[-1]), "downloads": 0}
        card = _front_matter(commit.files["README.md"].content.decode()) if "README.md" in commit.files else None
        card = card if isinstance(card, dict) else {}
        about |= {"cardData": card, "tags": list(card.get("tags") or []), "likes": 0, "spaces": []}
        about |= {name: card[name] for name in ("library_name", "pipeline_tag") if name in card}
        about["siblings"] = [{"rfilename": path} | self._sizes(request, blob) for path, blob in commit.files.items()]
        return Answer.of(about)

    @staticmethod
    def _sizes(request: Request, blob: Blob) -> dict:
        return {"size": len(blob.content), "blobId": blob.oid} if request.query.get("blobs") else {}

    def refs(self, request: Request) -> Answer:
        repo = self.store.readable(request.words["repo"], request.token)
        kinds: dict = {"branches": [], "tags": [], "converts": [], "pullRequests": []}
        for ref, oid in repo.refs.items():
            kind = {"heads": "branches", "tags": "tags"}.get(ref.split("/")[1], "pullRequests")
            kinds[kind].append({"name": ref.split("/", 2)[2], "ref": ref, "targetCommit": oid})
        return Answer.of(kinds)

    def commits(self, request: Request) -> Answer:
        repo = self.store.downloadable(request.words["repo"], request.token)
        told = [
            {"id": c.oid, "title": c.title, "message": "", "date": _date(c), "authors": [{"user": c.author}]}
            for c in repo.history(request.words["revision"])
        ]
        return Answer.of(told)

    def create_branch(self, request: Request) -> Answer:
        repo = self.store.writable(request.words["repo"], request.token)
        name = request.words["branch"]
        if f"refs/heads/{name}" in repo.refs:
            raise HubError(409, f"Reference already exists: {name}")
        repo.refs[f"refs/heads/{name}"] = repo.resolve(request.json().get("startingPoint") or "main").oid
        return Answer.of({})

    def delete_branch(self, request: Request) -> Answer:
        repo = self.store.writable(request.words["repo"], request.token)
        if request.words["branch"] == "main":
            raise HubError(403, "the branch main cannot be deleted")
        del repo.refs[repo.ref(request.words["branch"])]
        return Answer.of({})

    def create_tag(self, request: Request) -> Answer:
        repo, name = self.store.writable(request.words["repo"], request.token), request.json()["tag"]
        if f"refs/tags/{name}" in repo.refs:
            raise HubError(409, f"Tag reference exists already: {name}")
        repo.refs[f"refs/tags/{name}"] = repo.resolve(request.words["revision"]).oid
        return Answer.of({})

    def merge(self, request: Request) -> Answer:
        """Merges a pull request into `main`: its files become those of `main`."""
        repo = self.store.writable(request.words["repo"], request.token)
        files = repo.resolve(f"refs/pr/{request.words['number']}").files
        merged = repo.commit("refs/heads/main", f"Merge #{request.words['number']}", request.token.user, files)
        return Answer.of({"oid": merged.oid})

    # files of a revision

    def tree(self, request: Request) -> Answer:
        repo = self.store.readable(request.words["repo"], request.token)
        commit = repo.resolve(request.words["revision"])
        place = (request.words.get("path") or "").strip("/")
        below = {path: blob for path, blob in commit.files.items() if not place or path.startswith(f"{place}/")}
        if place and not below:
            raise HubError(404, f'{place} does not exist on "{request.words["revision"]}"', "EntryNotFound")
        folders = {folder for path in below for folder in _folders(path) if len(folder) > len(place)}
        entries = [_folder_entry(folder) for folder in folders] + [_entry(*item) for item in below.items()]
        if request.query.get("recursive", "").lower() not in ("1", "true"):
            entries = [entry for entry in entries if posixpath.dirname(entry["path"]) == place]
        entries.sort(key=lambda entry: entry["path"])
        start = int(request.query.get("cursor", 0))
        answer = Answer.of(entries[start : start + self.hub.page_size])
        if start + self.hub.page_size < len(entries):
            query = "&".join(f"{k}={v}" for k, v in (request.query | {"cursor": start + self.hub.page_size}).items())
            answer.headers["Link"] = f'<{self.endpoint}{request.path}?{query}>; rel="next"'
        return answer

    def paths_info(self, request: Request) -> Answer:
        repo = self.store.readable(request.words["repo"], request.token)
        files = repo.resolve(request.words["revision"]).files
        folders = {folder for path in files for folder in _folders(path)}
        content = request.json() if "json" in request.headers.get("Content-Type", "") else _form(request.body)
        paths = [path.strip("/") for path in content["paths"]]
        known = [_entry(path, files[path]) for path in paths if path in files]
        return Answer.of(known + [_folder_entry(path) for path in paths if path in folders])

    # commits

    def preupload(self, request: Request) -> Answer:
        repo, as_pr = self._target(request)
        commit, content = repo.resolve(request.words["revision"]), request.json()
        stored = commit.files.get(".gitignore")
        rules = content.get("gitIgnore", stored.content.decode() if stored else "")
        told = []
        for entry in content["files"]:
            path, there = entry["path"], commit.files.get(entry["path"])
            lfs = self.store.is_lfs(path, entry["size"], base64.b64decode(entry["sample"]))
            about = {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": ignored(rules, path)}
            told.append(about | ({"oid": there.etag} if there else {}))
        return Answer.of({"files": told, "commitOid": commit.oid})

    def commit(self, request: Request) -> Answer:
        repo, as_pr = self._target(request)
        lines = [json.loads(line) for line in request.body.splitlines() if line.strip()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        revision = request.words["revision"]
        base = repo.resolve(revision)
        if header.get("parentCommit") and header["parentCommit"] != base.oid:
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(base.files)
        for line in lines:
            if line["key"] != "header":
                self._apply(line["key"], line["value"], files)
        ref = repo.new_pull_request(revision) if as_pr else repo.ref(revision)
        made = repo.commit(ref, header["summary"], request.token.user, files)
        urls = {"commitUrl": f"{self.endpoint}/{repo.name}/commit/{made.oid}", "commitOid": made.oid}
        if as_pr:
            urls["pullRequestUrl"] = f"{self.endpoint}/{repo.name}/discussions/{ref.rpartition('/')[2]}"
        return Answer.of({"success": True, "hookOutput": ""} | urls)

    def _target(self, request: Request) -> tuple[Repository, bool]:
        """Who may read may open a pull request."""
        if request.query.get("create_pr") != "1":
            return self.store.writable(request.words["repo"], request.token), False
        if request.token is None or request.token.role != "write":
            raise HubError(403, "the token needs the write role to open a pull request")
        return self.store.downloadable(request.words["repo"], request.token), True

    def _apply(self, key: str, value: dict, files: dict[str, Blob]) -> None:
        path = value["path"]
        if key == "file":
            files[path] = Blob(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            content = self.store.objects.get(value["oid"])
            if content is None:
                raise HubError(400, f"the LFS object of {path} was not uploaded")
            files[path] = Blob(content, lfs=True)
        elif key in ("deletedFile", "deletedFolder"):
            gone = [name for name in files if name == path or name.startswith(f"{path.rstrip('/')}/")]
            if not gone:
                raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            for name in gone:
                del files[name]
        else:
            raise HubError(400, f"unknown operation {key}")


def _date(commit: Commit) -> str:
    return commit.date.strftime("%Y-%m-%dT%H:%M:%S.000Z")


def _folders(path: str) -> list[str]:
    parts = path.split("/")[:-1]
    return ["/".join(parts[: i + 1]) for i in range(len(parts))]


def _folder_entry(path: str) -> dict:
    return {"type": "directory", "oid": "0" * 40, "size": 0, "path": path}


def _entry(path: str, blob: Blob) -> dict:
    about = {"type": "file", "oid": blob.oid, "size": len(blob.content), "path": path}
    lfs = {"oid": blob.sha256, "size": len(blob.content), "pointerSize": len(blob.pointer)}
    return about | ({"lfs": lfs} if blob.lfs else {})


def _form(body: bytes) -> dict:
    return parse_qs(body.decode())


def _front_matter(text: str):
    found = re.match(r"\A---\s*\n(.*?)\n---\s*(\n|\Z)", text, re.DOTALL)
    return yaml.safe_load(found[1]) if found else None


def _card_faults(text: str) -> tuple[list[dict], list[dict]]:
    """Errors and warnings of a card's metadata, as far as the Hub's rules are public."""
    try:
        card = _front_matter(text)
    except yaml.YAMLError as error:
        return [{"message": f"YAML: {error}"}], []
    if card is None:
        return [], [{"message": "empty or missing yaml metadata in repo card"}]
    if not isinstance(card, dict):
        return [{"message": "the metadata must be an object"}], []
    found = []
    for name in ("base_model", "datasets"):
        for value in [card[name]] if isinstance(card.get(name), str) else card.get(name) or []:
            if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(value)):
                found.append({"message": f'"{name}" must be the name of a repository, not {value!r}'})
    if not isinstance(card.get("tags", []), list):
        found.append({"message": '"tags" must be an array'})
    return found, []
