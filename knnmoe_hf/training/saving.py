"""What a trainer writes: its memory, to a folder and to the Hub."""

from dataclasses import replace
from os import PathLike
from pathlib import Path

from knnmoe_hf.errors import shown
from knnmoe_hf.memory import RoutingMemory
from knnmoe_hf.memory.storage import CONFIG_FILE
from knnmoe_hf.models.hooks import RoutingHooks
from knnmoe_hf.training.arguments import KNNMoETrainingArguments
from knnmoe_hf.training.pushing import PushesMemory


class SavesMemory(PushesMemory):
    """The part of `KNNMoETrainer` that saves and uploads its memory, in place of the model."""

    args: KNNMoETrainingArguments
    memory: RoutingMemory | None
    memory_name: str

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

    def create_model_card(
        self,
        language: str | list[str] | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """
        States more for the memory's card, which `save_model` and `push_to_hub` write; what was saved to
        `args.output_dir` is saved anew.

        Args:
            language: of the reference data, `"en"`, `"code"`, ...
            license: of the reference data.
            tags: for the Hub, beside the library's own.
            model_name: title of the card.
            finetuned_from: repository of the base model on the Hub, where the model came from a local folder.
            tasks: nothing but `"text-generation"`.
            dataset_tags: repositories of the reference data on the Hub.
            dataset: what to call the reference data.
            dataset_args: configurations or splits of the reference data, put after its names.

        Raises:
            ValueError: before `train` has run, or for a value that is not allowed.
        """
        memory = self._built()
        if tasks not in (None, "text-generation", ["text-generation"]):
            raise ValueError(
                f"tasks={shown(tasks)} is not allowed: a memory is for 'text-generation', so leave it out."
            )
        given = dict(language=language, license=license, tags=tags, model_name=model_name)
        given |= dict(finetuned_from=finetuned_from, dataset_tags=dataset_tags, dataset=dataset)
        card_data = memory.card_data.stated(**given)
        if dataset_args is not None:
            said = ", ".join([dataset_args] if isinstance(dataset_args, str) else dataset_args)
            card_data = card_data.stated(dataset=[f"{name} ({said})" for name in card_data.dataset] or said)
        self.memory = replace(memory, card_data=card_data)
        hooks = RoutingHooks.of(self.model)
        if hooks is not None and getattr(hooks.named.get(self.memory_name), "memory", None) is memory:
            hooks.named[self.memory_name].memory = self.memory
        if self.args.should_save and Path(self.args.output_dir, CONFIG_FILE).is_file():
            self.save_model(_internal_call=True)
