"""What a trainer writes: its memory, to a folder and to the Hub."""

from os import PathLike

from knnmoe_hf.memory import RoutingMemory
from knnmoe_hf.training.arguments import KNNMoETrainingArguments
from knnmoe_hf.training.checks import repository_name


class SavesMemory:
    """The part of `KNNMoETrainer` that saves and uploads its memory, in place of the model."""

    args: KNNMoETrainingArguments
    memory: RoutingMemory | None

    def _built(self) -> RoutingMemory:
        if self.memory is None:
            raise ValueError("there is no memory yet: call train first.")
        return self.memory

    def save_model(self, output_dir: str | PathLike | None = None, _internal_call: bool = False) -> None:
        """
        Saves the memory (see `RoutingMemory.save_pretrained`) to a folder, by default `args.output_dir`.

        Raises:
            ValueError: before `train` has run, or if the memory's `recall` needs next tokens that would be left out.
        """
        if self.args.should_save:
            folder = output_dir if output_dir is not None else self.args.output_dir
            what = dict(provenance=self.args.save_provenance, next_tokens=self.args.save_next_tokens)
            self._built().save_pretrained(folder, overwrite=self.args.overwrite, **what)
            if self.args.push_to_hub and not _internal_call:
                self.push_to_hub("Model save")

    def create_model_card(self, *args, **kwargs) -> None:
        """Does nothing: `save_model` writes the memory's own model card."""

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
    ):
        """
        Uploads the memory to `args.hub_model_id`, by default the name of the folder `args.output_dir`.

        `blocking=False` has no effect: the call returns after the upload. `provenance` is what is uploaded of the
        references: `"ids"` by default (`"none"` if `args.save_provenance` says so), and their text only if it is
        `"text"`, whatever is saved locally. Without the text, the next tokens of the rows, which are the text in their
        order, are uploaded only with `next_tokens=True`. `overwrite` is as in `RoutingMemory.push_to_hub`, and
        `args.overwrite` by default. The first of several processes uploads.

        Raises:
            ValueError: before `train` has run, or if the memory's `recall` needs next tokens that would be left out.
        """
        memory = self._built()
        if not self.is_world_process_zero():
            return None
        at_most = "none" if self.args.save_provenance == "none" else "ids"
        return memory.push_to_hub(
            repository_name(self.args),
            revision=revision if revision is not None else self.args.hub_revision,
            private=private if private is not None else self.args.hub_private_repo,
            token=token if token is not None else self.args.hub_token,
            commit_message=commit_message,
            provenance=provenance if provenance is not None else at_most,
            overwrite=overwrite if overwrite is not None else self.args.overwrite,
            next_tokens=next_tokens,
        )
