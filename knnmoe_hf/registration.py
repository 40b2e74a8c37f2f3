"""Makes the auto classes of transformers know memories, without importing transformers before it is used."""

import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec

_AUTO_CONFIG = "transformers.models.auto.configuration_auto"
_AUTO_MODEL = "transformers.models.auto.modeling_auto"
_GENERATION = "transformers.generation.utils"


def register_auto_classes() -> None:
    """
    Registers memories with `AutoConfig` and `AutoModelForCausalLM`, now or as soon as transformers imports them, and
    has `generate` keep the memory that is in force when it begins.

    What is registered is a configuration and a loader, not a model class: a third-party model class would lose the
    native fast experts and checkpoint names.
    """
    steps = ((_AUTO_CONFIG, _register_config), (_AUTO_MODEL, _register_loader), (_GENERATION, _wrap_generations))
    for name, register in steps:
        if name in sys.modules:
            register()
        else:
            sys.meta_path.insert(0, _AfterImport(name, register))


def _register_config() -> None:
    from knnmoe_hf.config import KNNMoEConfig

    sys.modules[_AUTO_CONFIG].AutoConfig.register(KNNMoEConfig.model_type, KNNMoEConfig, exist_ok=True)


def _register_loader() -> None:
    from knnmoe_hf.models.auto import KNNMoEForCausalLM

    auto = sys.modules[_AUTO_MODEL].AutoModelForCausalLM
    auto.register(KNNMoEForCausalLM.config_class, KNNMoEForCausalLM, exist_ok=True)


def _wrap_generations() -> None:
    from knnmoe_hf.models.generations import wrap_generations

    wrap_generations(sys.modules[_GENERATION].GenerationMixin)


class _AfterImport(MetaPathFinder):
    """
    Calls a function once, right after a module was imported.

    It stays in `sys.meta_path` until the module has been executed: the module may be looked up without being imported
    (`importlib.util.find_spec`), and an import may fail and be tried again.
    """

    def __init__(self, name: str, then: Callable[[], None]):
        self.name, self.then = name, then

    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        if name != self.name:
            return None
        spec = self._found_by_the_others(path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_call(module) -> None:
                execute(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                    self.then()

            spec.loader.exec_module = execute_and_call
        return spec

    def _found_by_the_others(self, path, target) -> ModuleSpec | None:
        """What the finders after this one find; those before it have found nothing."""
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
            if (spec := finder.find_spec(self.name, path, target)) is not None:
                return spec
        return None
