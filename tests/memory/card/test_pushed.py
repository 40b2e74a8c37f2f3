"""What others find in a repository: a card that names no folder of the maker's machine, and a memory that loads."""

import pytest
from huggingface_hub import ModelCard

from knnmoe_hf import RoutingMemory
from tests.memory.card.examples import memory

SECRET = "/home/somebody/secret-project/base"


def pushed(hub, **given) -> dict[str, str]:
    """The texts of the repository, by name, after a push of a memory for a local base model."""
    one = memory()
    one.config.base_model_name_or_path = SECRET
    one.push_to_hub("me/memory", **given)
    files = hub.files("me/memory")
    return {name: text.decode() for name, text in files.items() if not name.endswith(".safetensors")}


@pytest.mark.parametrize("place", ["", "sub"])
def test_no_file_names_a_folder_of_the_makers_machine(hub, place):
    texts = pushed(hub, path_in_repo=place)
    prefix = f"{place}/" if place else ""
    assert {f"{prefix}README.md", f"{prefix}card.svg", f"{prefix}config.json"} <= set(texts)
    assert not [name for name, text in texts.items() if "secret-project" in text or "/home/" in text]
    assert "The base model is not named here" in texts[f"{prefix}README.md"]
    assert RoutingMemory.from_pretrained("me/memory", subfolder=place).card_data == memory().card_data


def test_the_base_model_that_is_named_while_pushing_is_loaded_by_others(hub):
    texts = pushed(hub, model_card_kwargs=dict(finetuned_from="me/base", license="mit"))
    card = ModelCard(texts["README.md"])
    assert (card.data.base_model, card.data.license) == ("me/base", "mit")
    assert RoutingMemory.from_pretrained("me/memory").config.base_model_name_or_path == "me/base"


def test_the_picture_of_an_earlier_memory_goes_with_it(hub):
    assert "card.svg" in pushed(hub)
    memory().remove_examples([0]).push_to_hub("me/memory")
    assert "card.svg" not in hub.files("me/memory")
