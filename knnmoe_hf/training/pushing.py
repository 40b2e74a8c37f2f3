"""What a trainer uploads, and when: its memory, and its checkpoints if `hub_strategy` says so."""

import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi
from transformers.trainer_utils import HubStrategy

from knnmoe_hf.errors import in_one_line, shown
from knnmoe_hf.memory import RoutingMemory
from knnmoe_hf.memory.hub import check_push
from knnmoe_hf.memory.hub_errors import told_in_one_sentence
from knnmoe_hf.memory.upload import commit_folder
from knnmoe_hf.training.arguments import KNNMoETrainingArguments
from knnmoe_hf.training.checkpoints import CHECKPOINT_FILE
from knnmoe_hf.training.checks import repository_name

logger = logging.getLogger(__name__)

_LINKED = ".uploading-"
_OF_CHECKPOINTS = (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS)


class PushesMemory:
    """
    The part of `KNNMoETrainer` that uploads.

    `args.hub_strategy` means what it means in `Trainer`, for a memory that is made at the end: with `"end"` it is
    uploaded by `save_model` and `push_to_hub` alone; with `"every_save"`, the default, by `train` too, when it is
    built; with `"checkpoint"` each checkpoint is uploaded as well while the build goes on, to the folder
    `last-checkpoint` of the repository, and with `"all_checkpoints"` to `checkpoint-N`. Unless `args.hub_always_push`,
    a checkpoint is left out while the one before it is still on its way. Uploads follow each other in a thread.
    """

    args: KNNMoETrainingArguments
    memory: RoutingMemory | None
    hub_model_id: str | None
    _uploads: ThreadPoolExecutor | None = None
    _last_upload: Future | None = None

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Makes the repository, in the first process; warns of what checkpoints hold if they are to be uploaded."""
        if not self.is_world_process_zero():
            return
        for leftover in Path(self.args.output_dir).glob(f"{_LINKED}*"):  # of a build that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        where = dict(private=private if private is not None else self.args.hub_private_repo)
        where |= dict(revision=self.args.hub_revision, token=token if token is not None else self.args.hub_token)
        self.hub_model_id = check_push(repository_name(self.args), **where)
        if self.args.push_to_hub and self.args.hub_strategy in _OF_CHECKPOINTS:
            logger.warning(
                "hub_strategy=%r uploads checkpoints to %s, which hold the text of the references as token ids and "
                "their hidden states as they are: leave it out unless whoever may read the repository may read these.",
                self.args.hub_strategy.value,
                self.hub_model_id,
            )

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        provenance: str | bool | None = None,
        overwrite: bool | None = None,
        next_tokens: bool | None = None,
        **kwargs,
    ) -> CommitInfo | Future | None:
        """
        Uploads the memory in one commit to `args.hub_model_id`, by default the name of the folder `args.output_dir`.

        Args:
            commit_message, token, revision, private: as in `Trainer`; those of `args` by default.
            blocking: wait for the upload.
            provenance: what is uploaded of the references: `"ids"` by default (`"none"` if `args.save_provenance` says
                so), and their text only if it is `"text"`, whatever is saved locally.
            overwrite: as in `RoutingMemory.push_to_hub`; `args.overwrite` by default.
            next_tokens: without the text, the next tokens of the rows, which are the text in their order, are uploaded
                only if True.
            kwargs: for the card, as in `create_model_card` (`license=`, `dataset=`, ...).

        Returns:
            The commit, or a `Future` of it with `blocking=False`; None in all processes but the first.

        Raises:
            ValueError: before `train` has run, or if the memory's `recall` needs next tokens that would be left out.
            Exception: as `RoutingMemory.push_to_hub`.
        """
        memory = self._built()
        if not self.is_world_process_zero():
            return None
        if kwargs:
            self.create_model_card(**kwargs)
            memory = self._built()
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        at_most = "none" if self.args.save_provenance == "none" else "ids"
        done = self._queue(
            memory.push_to_hub,
            self.hub_model_id or repository_name(self.args),
            revision=revision if revision is not None else self.args.hub_revision,
            private=private if private is not None else self.args.hub_private_repo,
            token=token if token is not None else self.args.hub_token,
            commit_message=commit_message or "End of training",
            provenance=provenance if provenance is not None else at_most,
            overwrite=overwrite if overwrite is not None else self.args.overwrite,
            next_tokens=next_tokens,
        )
        return done.result() if blocking else done

    def push_when_built(self) -> None:
        """What `train` uploads at its end; a failure is told and does not lose the memory."""
        if not (self.args.push_to_hub and self.is_world_process_zero()):
            return
        self._finish_current_push()
        if self.args.hub_strategy == HubStrategy.END:
            return
        try:
            self.push_to_hub()
        except Exception as error:
            logger.error("the memory is built but not uploaded: %s Call push_to_hub then.", in_one_line(error))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Uploads a checkpoint while the build goes on, if `args.hub_strategy` says so; `Trainer` calls it."""
        if not self.is_world_process_zero() or self.args.hub_strategy not in _OF_CHECKPOINTS:
            return
        if self._is_uploading() and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        name, last = Path(checkpoint_folder).name, self.args.hub_strategy == HubStrategy.CHECKPOINT
        self._queue(
            _upload_checkpoint,
            _linked(Path(checkpoint_folder)),  # old checkpoints are deleted meanwhile
            self.hub_model_id,
            path_in_repo="last-checkpoint" if last else name,
            revision=self.args.hub_revision,
            token=self.args.hub_token,
            commit_message=f"Training in progress, step {self.state.global_step}, checkpoint",
        ).add_done_callback(_tell_failure)

    def _finish_current_push(self) -> None:
        """Waits for the uploads that are on their way; `Trainer` calls it at the end of its loop."""
        if self._is_uploading():
            logger.info("waiting for the upload of the last checkpoint")
            self._last_upload.exception()

    def _is_uploading(self) -> bool:
        return self._last_upload is not None and not self._last_upload.done()

    def _queue(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Future:
        """Runs it after the uploads before it; the interpreter does not exit before it is done."""
        if self._uploads is None:
            self._uploads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="upload")
        self._last_upload = self._uploads.submit(call, *args, **kwargs)
        return self._last_upload


def _upload_checkpoint(folder: Path, repo: str, token: str | None, **where: Any) -> None:
    """One commit that makes a folder of the repository what this folder is; deletes this one."""

    def replaced(commit: str, there: set[str]) -> set[str]:
        if there and CHECKPOINT_FILE not in there:
            raise FileExistsError(
                f"{where['path_in_repo']} in the repository {shown(repo)} is not a checkpoint of a build: move it "
                "away, or name another repository."
            )
        return there

    try:
        with told_in_one_sentence(repo, where["revision"], writing=True):
            commit_folder(HfApi(token=token), repo, folder, replaced, **where)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _tell_failure(upload: Future) -> None:
    if (error := upload.exception()) is not None:
        logger.error("a checkpoint was not uploaded: %s", in_one_line(error))


def _linked(folder: Path) -> Path:
    """The files of a checkpoint once more, as hard links where that is possible."""
    place = Path(tempfile.mkdtemp(prefix=_LINKED, dir=folder.parent))

    def link(source: str, target: str) -> None:
        try:
            os.link(source, target)
        except OSError:  # a file system without hard links
            shutil.copyfile(source, target)

    shutil.copytree(folder, place, copy_function=link, dirs_exist_ok=True)
    return place
