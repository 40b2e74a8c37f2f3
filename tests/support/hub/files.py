"""Files: LFS uploads in one part or several, and downloads by revision, with ETags and ranges."""

import hashlib
import re
from urllib.parse import quote

from tests.support.hub.http import Answer, Request
from tests.support.hub.store import HubError

_RANGE = re.compile(r"bytes=(\d*)-(\d*)")


class Files:
    """
    The endpoints of file contents.

    Args:
        hub: the `HubServer`.
        storage: address of the storage behind it, of another origin: clients must not send it their token.
    """

    def __init__(self, hub, storage: str):
        self.hub, self.store, self.endpoint, self.storage = hub, hub.store, hub.endpoint, storage

    def batch(self, request: Request) -> Answer:
        """`POST /{repo}.git/info/lfs/objects/batch`: where to upload what is not there yet."""
        content = request.json()
        if "ref" in content:
            self.store.writable(request.words["repo"], request.token)
        else:  # of a pull request, which whoever may read may open
            self.store.downloadable(request.words["repo"], request.token)
        several = "multipart" in content.get("transfers", [])
        objects = [self._action(request.words["repo"], entry, several) for entry in content["objects"]]
        return Answer.of({"transfer": "multipart" if several else "basic", "objects": objects})

    def _action(self, repo: str, entry: dict, several: bool) -> dict:
        oid, size = entry["oid"], entry["size"]
        if oid in self.store.objects:
            return {"oid": oid, "size": size}
        upload: dict = {"href": f"{self.storage}/lfs/object/{oid}"}
        if several and size > self.hub.part_size:
            count = -(-size // self.hub.part_size)
            parts = {str(n): f"{self.storage}/lfs/part/{oid}/{n}" for n in range(1, count + 1)}
            header = {"chunk_size": str(self.hub.part_size)} | parts
            upload = {"href": f"{self.endpoint}/lfs/complete/{oid}", "header": header}
        verify = {"href": f"{self.endpoint}/{repo}.git/info/lfs/verify"}
        return {"oid": oid, "size": size, "authenticated": True, "actions": {"upload": upload, "verify": verify}}

    def put_object(self, request: Request) -> Answer:
        """`PUT /lfs/object/{oid}`: a signed address, so no token is needed."""
        self._keep(request.words["oid"], request.body)
        return Answer()

    def put_part(self, request: Request) -> Answer:
        """`PUT /lfs/part/{oid}/{number}`, answered with the ETag that completes the upload."""
        parts = self.store.parts.setdefault(request.words["oid"], {})
        parts[int(request.words["number"])] = request.body
        return Answer(headers={"ETag": f'"{hashlib.md5(request.body).hexdigest()}"'})

    def complete(self, request: Request) -> Answer:
        """`POST /lfs/complete/{oid}`"""
        oid, parts = request.words["oid"], self.store.parts.get(request.words["oid"], {})
        for part in request.json()["parts"]:
            found = parts.get(part["partNumber"])
            if found is None or hashlib.md5(found).hexdigest() != part["etag"].strip('"'):
                raise HubError(400, f"part {part['partNumber']} was not uploaded")
        self._keep(oid, b"".join(parts[n] for n in sorted(parts)))
        return Answer.of({"success": True})

    def _keep(self, oid: str, content: bytes) -> None:
        if hashlib.sha256(content).hexdigest() != oid:
            raise HubError(400, "the content is not what its SHA-256 says")
        self.store.objects[oid] = content

    def verify(self, request: Request) -> Answer:
        """`POST /{repo}.git/info/lfs/verify`"""
        self.store.downloadable(request.words["repo"], request.token)
        content = request.json()
        if len(self.store.objects.get(content["oid"], b"")) != content["size"]:
            raise HubError(404, "the object is not there")
        return Answer.of({"success": True})

    def resolve(self, request: Request) -> Answer:
        """`GET` and `HEAD /{repo}/resolve/{revision}/{path}`; LFS objects are sent from another address."""
        words = request.words
        repo = self.store.downloadable(words["repo"], request.token)
        commit = repo.resolve(words["revision"])
        known = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        blob = commit.files.get(words["path"])
        if blob is None:
            error = Answer.of_error(HubError(404, "Entry not found", "EntryNotFound"))
            error.headers |= known
            return error
        name = quote(words["path"].rpartition("/")[2])
        if blob.lfs:
            known |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.content))}
            return Answer(b"", 302, known | {"Location": f"{self.storage}/cdn/{blob.sha256}?name={name}"})
        return _ranged(request, blob.content, known | _named(name) | {"ETag": f'"{blob.oid}"'})

    def cdn(self, request: Request) -> Answer:
        """`GET` and `HEAD /cdn/{oid}`: a signed address, so no token is needed."""
        content = self.store.objects.get(request.words["oid"])
        if content is None:
            raise HubError(404, "no such object")
        return _ranged(request, content, _named(request.query["name"]) | {"ETag": f'"{request.words["oid"]}"'})


def _named(name: str) -> dict[str, str]:
    return {"Content-Disposition": f'inline; filename="{name}";'}


def _ranged(request: Request, content: bytes, headers: dict[str, str]) -> Answer:
    """The whole, or the range that is asked for."""
    headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes"} | headers
    asked = _RANGE.fullmatch(request.headers.get("Range", ""))
    if asked is None or asked.groups() == ("", ""):
        return Answer(content, 200, headers | {"Content-Length": str(len(content))})
    first, last = asked.groups()
    start = int(first) if first else max(0, len(content) - int(last))
    stop = min(int(last) + 1, len(content)) if first and last else len(content)
    if start >= len(content):
        return Answer(b"", 416, headers | {"Content-Range": f"bytes */{len(content)}"})
    part = content[start:stop]
    about = {"Content-Range": f"bytes {start}-{stop - 1}/{len(content)}", "Content-Length": str(len(part))}
    return Answer(part, 206, headers | about)
